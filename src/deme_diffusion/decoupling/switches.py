"""What a training asks of torch beyond its mathematics: global switches, memory format, compilation, checkpointing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deme_diffusion.config import RuntimeSettings, TrainSettings
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.models.denoiser import Denoiser


@contextmanager
def switched(runtime: RuntimeSettings, *, allow_tf32: bool = False) -> Iterator[None]:
    """torch's global switches by `runtime.deterministic` and TF32; on leaving, they are as before."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32)
    strict = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    cudnn.benchmark, cudnn.deterministic = not runtime.deterministic, runtime.deterministic
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # only heard before CUDA's first product
        torch.use_deterministic_algorithms(True)
    if allow_tf32:
        cudnn.allow_tf32 = matmul.allow_tf32 = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])


def laid_out(module: nn.Module, runtime: RuntimeSettings) -> nn.Module:
    """The module, in place, in the memory format and compiled as the settings say; names of its state stay."""
    if runtime.channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if runtime.compile:
        _check_compiler(next(module.parameters()).device)
        # Else code compiled for a model without projections, which are hooks, would be run for one that has them.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        module.compile()
    return module


def checkpoint_gradients(module: nn.Module) -> None:
    """Let the module compute activations anew in the backward pass. Raises UserError where it cannot."""
    able: Any = module
    if not getattr(module, "_supports_gradient_checkpointing", False):
        raise UserError(f"runtime.gradient_checkpointing: a {type(module).__name__} has none; leave it off")
    able.enable_gradient_checkpointing()


def forget_compiled() -> None:
    """Drop compiled code: models of other trainings share it, and soon there would be too many variants of it."""
    torch.compiler.reset()


def check_compiled(denoiser: Denoiser, student: nn.Module, settings: TrainSettings) -> None:
    """Compare a compiled student's gradients with its own uncompiled ones, on noise. Raises MachineError.

    Several versions of torch compile upsampling to a wrong backward pass, without a word.
    """
    compiled = _gradients(denoiser, student, settings)
    with torch.compiler.set_stance("force_eager"):
        plain = _gradients(denoiser, student, settings)
    norm = float(torch.stack([gradient.norm() for gradient in plain.values()]).norm())
    for name, gradient in plain.items():
        if not float((compiled[name] - gradient).norm()) <= 0.05 * float(gradient.norm()) + 1e-3 * norm:
            instead = f"{float(compiled[name].norm()):.3g} instead of {float(gradient.norm()):.3g}"
            raise MachineError(
                f"runtime.compile: torch {torch.__version__} compiles the model to other gradients (of {name}, "
                f"{instead}); use runtime.compile=false"
            )


def _gradients(denoiser: Denoiser, student: nn.Module, settings: TrainSettings) -> dict[str, torch.Tensor]:
    """Of the mean square of an answer; without dropout, which compiled code draws in its own way."""
    first = next(student.parameters())
    shape = (settings.train_batch_size, *denoiser.sample_shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(first)
    t = torch.arange(len(x), device=first.device) % denoiser.num_train_timesteps
    dropout = any(isinstance(part, nn.Dropout) and part.p for part in student.modules())
    half = torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16
    with torch.autocast(first.device.type, dtype=half, enabled=settings.mixed_precision != "no"):
        answer = denoiser.predict(student.train(not dropout), x, t, {})
    answer.float().square().mean().backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.detach() for name, p in student.named_parameters() if p.grad is not None}
    student.train().zero_grad(set_to_none=True)
    return gradients


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise MachineError("runtime.compile on a GPU needs triton, which is not installed; use runtime.compile=false")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise MachineError("runtime.compile on a CPU needs a C++ compiler (g++); use runtime.compile=false")
