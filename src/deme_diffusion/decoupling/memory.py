"""How much memory a training needs, reckoned before its first step, and whether there is as much."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from deme_diffusion.config import RuntimeSettings, TrainSettings
from deme_diffusion.decoupling.step import Job
from deme_diffusion.decoupling.student import Student
from deme_diffusion.decoupling.switches import checkpoint_gradients
from deme_diffusion.errors import UserError
from deme_diffusion.models.denoiser import Denoiser, Noised
from deme_diffusion.models.lora import adapt
from deme_diffusion.models.precision import computes_in
from deme_diffusion.models.projection import Projected

T = TypeVar("T", bound=nn.Module)
Breakdown = dict[str, int]
"""Bytes by what they are for; `base` is there already when a training begins."""


def estimate(
    denoiser: Denoiser, job: Job, runtime: RuntimeSettings, device: torch.device, processes: int = 1
) -> Breakdown:
    """Peak bytes of one training on its device: base, weights, gradients, optimizer, ema, teacher, activations.

    Activations are those that one forward at `train_batch_size` leaves for the backward pass, counted on tensors that
    hold no numbers; what single operations need in passing (a convolution's workspace) is not in it.
    """
    settings = job.settings
    with FakeTensorMode():
        student = _student(denoiser, job)
        trained = denoiser.trainable(student)
        weights, count = _bytes(trained), sum(p.numel() for p in trained)
        weights += 0 if job.lora else _bytes(student.buffers())
        if settings.mixed_precision != "no" and device.type != "cpu":
            _norms_in_float32(student)
        activations = _activations(denoiser, student, settings)
        if runtime.gradient_checkpointing:
            activations = _activations_checkpointed(denoiser, student, settings)
    averages = 0 if not settings.use_ema else 1 if not runtime.offload_ema else 2 if device.type == "cpu" else 0
    return {
        "base": _base(denoiser, job, device),
        "weights": weights,
        "gradients": weights * (1 + _more_gradients(job, processes)) + _compared(job, trained),
        "optimizer": 2 * (count if settings.use_8bit_adam else weights),
        "ema": averages * weights,
        "teacher": _teacher(denoiser, job, count),
        "activations": activations,
    }


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    known = [value for value in (_available(), _left_in_group()) if value is not None]
    return min(known) if known else None


def check_memory(
    denoiser: Denoiser, job: Job, runtime: RuntimeSettings, device: torch.device, processes: int = 1
) -> Breakdown:
    """The estimate. Raises UserError when less is free, saying what to lower."""
    needed = estimate(denoiser, job, runtime, device, processes)
    total, free = sum(needed.values()) - _resident(denoiser, device), free_memory(device)
    if free is not None and total > free:
        largest = sorted((kind for kind in needed if kind != "base"), key=lambda kind: -needed[kind])[:2]
        raise UserError(
            f"{job.name}: training needs about {_gb(total)} of memory on the {device.type} "
            f"({', '.join(f'{kind} {_gb(needed[kind])}' for kind in largest)}, ...), but {_gb(free)} is free; "
            f"lower {_advice(job, runtime, device, wide=computes_in(denoiser.module) == torch.float32)}"
        )
    return needed


def altogether(denoiser: Denoiser, job: Job, runtime: RuntimeSettings, device: torch.device) -> int:
    """Peak bytes of one training in a process of its own, which brings the base to the device first."""
    needed = estimate(denoiser, job, runtime, device)
    return sum(needed.values()) - needed["base"] + (0 if _makes_way(job, device) else size_of(denoiser.module))


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return _bytes([*module.parameters(), *module.buffers()])


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _student(denoiser: Denoiser, job: Job) -> Student:
    """The student, of tensors that hold no numbers."""
    if job.lora is not None:
        with unset_fake_temporarily():  # in which peft could put nothing in
            adapted = adapt(_emptied(denoiser.module, device="meta"), job.lora, job.seed)
        return _emptied(adapted).train()
    return Projected(_emptied(denoiser.module, master=True), job.projection, job.projection_axes).train()


def _base(denoiser: Denoiser, job: Job, device: torch.device) -> int:
    """Bytes of the base on the device; the only copy of it, where adapters are trained in it."""
    if job.lora is not None:
        return size_of(denoiser.module)
    return 0 if _makes_way(job, device) else _resident(denoiser, device)


def _resident(denoiser: Denoiser, device: torch.device) -> int:
    """Bytes of the base where it lies on the device already."""
    there = next(denoiser.module.parameters()).device.type == device.type
    return size_of(denoiser.module) if there else 0


def _makes_way(job: Job, device: torch.device) -> bool:
    """Whether a teacher in half precision stands in for the base on a GPU (`Denoiser.teacher`)."""
    halved = job.teacher == "frozen" and job.teacher_precision is not None and job.lora is None
    return halved and bool(job.consistency_weight) and device.type != "cpu"


def _teacher(denoiser: Denoiser, job: Job, count: int) -> int:
    """Bytes of a teacher that is not the base itself."""
    if (
        not job.consistency_weight
        or job.lora is not None
        or (job.teacher == "frozen" and job.teacher_precision is None)
    ):
        return 0
    held = count if job.teacher == "ema" else sum(p.numel() for p in denoiser.module.parameters())
    return held * (job.teacher_precision or torch.float32).itemsize


def _more_gradients(job: Job, processes: int) -> int:
    """Beside one: the buckets in which they go round, and those of all clusters together."""
    return (processes > 1) + (job.multi_task_clusters if job.multi_task == "nash" else 0)


def _compared(job: Job, trained: Sequence[nn.Parameter]) -> int:
    """NashMTL's inner products: the clusters' gradients of one tensor, twice in float64 (`bargaining.gram`)."""
    largest = max(p.numel() for p in trained)
    return 16 * job.multi_task_clusters * largest if job.multi_task == "nash" else 0


def _advice(job: Job, runtime: RuntimeSettings, device: torch.device, *, wide: bool = True) -> str:
    """The settings that are left to change; `wide`: the base is held in float32."""
    batch = f"train_batch_size={job.settings.train_batch_size} (raising gradient_accumulation_steps as much)"
    others = {
        "multi_task=uncertainty": job.multi_task == "nash",
        "runtime.gradient_checkpointing=true": not runtime.gradient_checkpointing,
        "runtime.offload_ema=true": device.type != "cpu" and job.settings.use_ema and not runtime.offload_ema,
        "model.dtype=bfloat16": job.lora is not None and wide,
        "teacher_dtype=bfloat16": bool(job.consistency_weight) and job.teacher_precision is None
        and job.lora is None and (device.type != "cpu" or job.teacher == "ema"),
    }  # fmt: skip
    left = [name for name, possible in others.items() if possible]
    return batch + (f", or set {', '.join(left)}" if left else "")


def _emptied(module: T, *, master: bool = False, device: str = "cpu") -> T:
    """A copy whose tensors have shapes but no memory: of a student on a CPU, since a GPU's need a GPU for it.

    `master`: trained as a whole, and so in float32.
    """
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        widens = master and tensor.is_floating_point() and tensor.dtype != torch.float64
        empty = torch.empty(tensor.shape, dtype=torch.float32 if widens else tensor.dtype, device=device)
        trained = master or tensor.requires_grad
        memo[id(tensor)] = nn.Parameter(empty, trained) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def _norms_in_float32(module: nn.Module) -> None:
    """As a GPU's autocast runs them, and a CPU's does not."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def _activations(denoiser: Denoiser, student: Student, settings: TrainSettings) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    with _counting(student) as stored:
        return _forward(denoiser, student, settings, stored)


def _forward(denoiser: Denoiser, student: nn.Module, settings: TrainSettings, stored: dict[int, int]) -> int:
    x = torch.empty(settings.train_batch_size, *denoiser.sample_shape, dtype=next(student.parameters()).dtype)
    t = torch.zeros(settings.train_batch_size, dtype=torch.long)
    condition = {key: value.cpu() for key, value in denoiser.placeholder(settings.train_batch_size).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.mixed_precision != "no"):
        # Which holds on to the graph while it is counted.
        loss = (denoiser.answer(student, Noised(x, t, x, condition)) - x).square().mean()
    assert loss.requires_grad
    return sum(stored.values())


def _activations_checkpointed(denoiser: Denoiser, student: Student, settings: TrainSettings) -> int:
    """Those at the borders of the parts that are computed anew, and all of the largest part's."""
    parts = [0]
    with _counting(student) as stored:

        def measured(part: Any, *inputs: Any) -> Any:
            before = sum(stored.values())
            answer = part(*inputs)
            parts.append(sum(stored.values()) - before)
            return answer

        checkpoint_gradients(student.component, measured)
        _forward(denoiser, student, settings, stored)
    checkpoint_gradients(student.component)
    return _activations(denoiser, student, settings) + max(parts)


@contextmanager
def _counting(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage that autograd saves, parameters apart."""
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    stored: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # or another tensor's storage would get the same address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            stored[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield stored


def _available() -> int | None:
    """MemAvailable of Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _left_in_group() -> int | None:
    """What a container's limit leaves (cgroup v2, or v1); file caches do not count, since they give way."""
    root = Path("/sys/fs/cgroup")
    for limit, used, cache in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            most, now = int((root / limit).read_text()), int((root / used).read_text())  # `max`: no limit, no number
            stat = dict(line.split() for line in (root / cache).read_text().splitlines())
            return most - now + int(stat.get("inactive_file", 0))
        except (OSError, ValueError):
            continue
    return None


def _gb(size: int) -> str:
    return f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"
