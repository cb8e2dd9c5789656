"""What a training asks of torch beyond its mathematics: global switches, memory format, compilation, checkpointing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from deme_diffusion.config import RuntimeSettings, TrainSettings
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.models.denoiser import Denoiser, Noised

SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
"""Of the loss where gradients in fp16 are compared: as the first of a gradient scaler's, and smaller ones."""


@contextmanager
def switched(runtime: RuntimeSettings, *, allow_tf32: bool | None = None) -> Iterator[None]:
    """torch's global switches by `runtime.deterministic` and TF32 (None: as it stands); on leaving, as before."""
    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.deterministic)
    strict = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    cudnn.benchmark, cudnn.deterministic = not runtime.deterministic, runtime.deterministic
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # only heard before CUDA's first product
        torch.use_deterministic_algorithms(True)
    try:
        with nullcontext() if allow_tf32 is None else _tf32(allow_tf32):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Matrix products and convolutions in TF32 or not, by torch's old flags and by the precisions that replace them."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags: list[tuple[Any, str]] = [(cudnn, "allow_tf32"), (matmul, "allow_tf32")]
    newer = [getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), matmul]
    precisions: list[tuple[Any, str]] = [(p, "fp32_precision") for p in newer if hasattr(p, "fp32_precision")]
    before = list(_readable([*flags, *precisions]))
    # The flags first: torch refuses to read them where they contradict the precisions, as its compiler does.
    for owner, name in flags:
        setattr(owner, name, allowed)
    for owner, name in precisions:
        setattr(owner, name, "tf32" if allowed else "ieee")
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _readable(switches: list[tuple[Any, str]]) -> Iterator[tuple[Any, str, Any]]:
    """Those that can be read, with their values: not a flag whose newer precision a user has set."""
    for owner, name in switches:
        with suppress(RuntimeError):
            yield owner, name, getattr(owner, name)


def laid_out(module: nn.Module, runtime: RuntimeSettings) -> nn.Module:
    """The module, in place, in the memory format and compiled as the settings say; names of its state stay."""
    if runtime.channels_last:
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.ndim == 4:  # torch refuses modules that also have kernels of three axes, as a video's
                tensor.data = tensor.data.to(memory_format=torch.channels_last)
    if runtime.compile:
        check_compiler(next(module.parameters()).device)
        # Else code compiled for a model without projections, which are hooks, would be run for one that has them.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        module.compile()
    return module


def checkpoint_gradients(module: nn.Module, how: Callable[..., Any] | None = None) -> None:
    """Let the module compute activations anew in the backward pass. Raises UserError where it cannot.

    `how` takes a part and its inputs in place of torch's own checkpointing.
    """
    able: Any = module
    if not getattr(module, "_supports_gradient_checkpointing", False):
        raise UserError(f"runtime.gradient_checkpointing: a {type(module).__name__} has none; leave it off")
    able.enable_gradient_checkpointing(how)


def forget_compiled() -> None:
    """Drop compiled code: models of other trainings share it, and soon there would be too many variants of it."""
    torch.compiler.reset()


def check_compiled(denoiser: Denoiser, student: nn.Module, settings: TrainSettings) -> None:
    """Compare a compiled student's gradients with its own uncompiled ones, on noise. MachineError where they differ,
    or where it does not compile.

    Several versions of torch compile upsampling to a wrong backward pass, without a word.
    """
    with torch.compiler.set_stance("force_eager"):
        scale, plain = _finite_gradients(denoiser, student, settings)
    try:
        compiled = gradients(denoiser, student, settings, scale)
    except torch._dynamo.exc.TorchDynamoException as error:
        why = " ".join(str(error).split("\n")[:2]) or type(error).__name__  # whose fault it is stands in the second
        raise MachineError(
            f"runtime.compile: torch {torch.__version__} does not compile the model ({why}); use runtime.compile=false"
        ) from None
    norm = float(torch.stack([gradient.norm() for gradient in plain.values()]).norm())
    for name, gradient in plain.items():
        if not float((compiled[name] - gradient).norm()) <= 0.05 * float(gradient.norm()) + 1e-3 * norm:
            instead = f"{float(compiled[name].norm()):.3g} instead of {float(gradient.norm()):.3g}"
            raise MachineError(
                f"runtime.compile: torch {torch.__version__} compiles the model to other gradients (of {name}, "
                f"{instead}); use runtime.compile=false"
            )


def _finite_gradients(
    denoiser: Denoiser, student: nn.Module, settings: TrainSettings
) -> tuple[float, dict[str, torch.Tensor]]:
    """Gradients that are 0 or infinite in fp16 would say nothing: with the largest scale at which all are finite."""
    found: dict[str, torch.Tensor] = {}
    scales = SCALES if settings.mixed_precision == "fp16" else (1.0,)
    for scale in scales:
        found = gradients(denoiser, student, settings, scale)
        if all(bool(gradient.isfinite().all()) for gradient in found.values()):
            return scale, found
    return scales[-1], found


def gradients(
    denoiser: Denoiser, student: nn.Module, settings: TrainSettings, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Of the mean square of an answer, times `scale`; without dropout, which compiled code draws in its own way."""
    first = next(student.parameters())
    noised = _noise(denoiser, settings.train_batch_size, first.device)
    dropout = any(isinstance(part, nn.Dropout) and part.p for part in student.modules())
    half = torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16
    with torch.autocast(first.device.type, dtype=half, enabled=settings.mixed_precision != "no"):
        answer = denoiser.answer(student.train(not dropout), noised)
    (scale * answer.float().square().mean()).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.detach() for name, p in student.named_parameters() if p.grad is not None}
    student.train().zero_grad(set_to_none=True)
    return found


def _noise(denoiser: Denoiser, count: int, device: torch.device) -> Noised:
    """Samples and conditions that are nothing but noise; of a condition in whole numbers, as a class, the placeholder.

    Where a text is all zeros, so are the gradients of what reads it.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((count, *denoiser.sample_shape), generator=draw).to(device)
    given = {name: value.to(device) for name, value in denoiser.placeholder(count).items()}
    condition = {
        name: torch.randn(value.shape, generator=draw).to(value) if value.is_floating_point() else value
        for name, value in given.items()
    }
    return Noised(x, torch.arange(count, device=device) % denoiser.num_train_timesteps, x, condition)


def check_compiler(device: torch.device) -> None:
    """Raises MachineError where torch.compile lacks what it compiles with."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise MachineError("runtime.compile on a GPU needs triton, which is not installed; use runtime.compile=false")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise MachineError("runtime.compile on a CPU needs a C++ compiler (g++); use runtime.compile=false")
