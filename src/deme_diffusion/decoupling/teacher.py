"""The teacher of the consistency loss: the frozen base, or the student's own moving average, renewed now and then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.step import Job
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.lora import Bare
from deme_diffusion.models.projection import Projected
from deme_diffusion.weights import State


def teaching(denoiser: Denoiser, job: Job) -> AbstractContextManager[nn.Module | None]:
    """The teacher while a job is trained; None where nothing is to be consistent with it."""
    if not job.consistency_weight:
        return nullcontext(None)
    if job.lora is not None:  # the very weights that the student's adapters are in
        return nullcontext(Bare(denoiser.module))
    return denoiser.teacher(job.teacher_precision) if job.teacher == "frozen" else _averaged(denoiser, job)


@contextmanager
def _averaged(denoiser: Denoiser, job: Job) -> Iterator[nn.Module]:
    """The base at first, with the student's projections, so that the student's average fits into it."""
    teacher = Projected(denoiser.student(), job.projection, job.projection_axes)
    yield teacher.to(job.teacher_precision).requires_grad_(False).eval()


class Averaged:
    """Keeps a teacher that is the student's average: renews it, and carries it through checkpoints."""

    def __init__(self, denoiser: Denoiser, teacher: nn.Module, ema: Ema, every: int) -> None:
        self.parameters, self.ema, self.every = denoiser.trainable(teacher), ema, every

    def step(self, step: int) -> None:
        """After so many steps the teacher becomes what the student's average then is."""
        if step % self.every == 0:
            self.restore(self.ema.state())

    def state(self) -> State:
        """The teacher's parameters by position."""
        return {str(i): parameter.detach() for i, parameter in enumerate(self.parameters)}

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """The inverse of `state`."""
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(state[str(i)])
