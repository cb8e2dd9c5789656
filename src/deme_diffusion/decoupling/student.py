"""What a training trains: a copy of the base with its projections, or the base itself with adapters in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deme_diffusion.config import RuntimeSettings
from deme_diffusion.decoupling.initial import started
from deme_diffusion.decoupling.step import Job
from deme_diffusion.decoupling.switches import checkpoint_gradients, forget_compiled, laid_out
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.lora import Adapted, adapt, lent
from deme_diffusion.models.projection import Projected
from deme_diffusion.weights import State

Student = Projected | Adapted


def student_of(denoiser: Denoiser, job: Job, runtime: RuntimeSettings) -> Student:
    """The model that a job trains, as it starts."""
    if runtime.compile:
        forget_compiled()
    if job.lora is not None:
        student: Student = adapt(denoiser.module, job.lora, job.seed)
        laid_out(student.component, runtime)
    else:
        student = Projected(laid_out(started(denoiser, job.start), runtime), job.projection, job.projection_axes)
    if runtime.gradient_checkpointing:
        checkpoint_gradients(student.component)
    return student


@contextmanager
def borrowed(denoiser: Denoiser, job: Job, runtime: RuntimeSettings) -> Iterator[None]:
    """While a job is trained whose student is the base itself; afterwards that is as it was, to the bit."""
    if job.lora is None:
        yield
        return
    base: Any = denoiser.module
    with lent(base):
        try:
            yield
        finally:
            base._compiled_call_impl = None
            if runtime.gradient_checkpointing:
                base.disable_gradient_checkpointing()
            if runtime.channels_last:
                for tensor in [*base.parameters(), *base.buffers()]:
                    tensor.data = tensor.data.contiguous()


def state_of(student: nn.Module) -> State:
    """What a training changes: all of a student's state, or its adapters' alone."""
    return student.own_state() if isinstance(student, Adapted) else dict(student.state_dict())


@torch.no_grad()
def load_state_of(student: nn.Module, state: State) -> None:
    """The inverse of `state_of`."""
    if isinstance(student, Adapted):
        student.load_own_state(state)
    else:
        student.load_state_dict(state)
