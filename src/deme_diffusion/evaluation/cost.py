"""What serving a model costs: parameters, latency, load time, peak memory, disk."""

from __future__ import annotations

import itertools
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deme_diffusion.config import SamplerSettings
from deme_diffusion.evaluation.sample import image_seeds, make_scheduler, sample
from deme_diffusion.models.denoiser import Denoiser

REPEATS = 5
LOADS = 3
PAGE = 4096  # bytes


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of tensors alive on the CPU, and their peak: exact, where a process's resident size is mostly libraries."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_memory(denoiser: Denoiser, module: nn.Module, sampler: SamplerSettings, batch_size: int) -> int:
    """Peak bytes while one batch is sampled: the weights in memory (of all resident experts) and activations."""
    sample(denoiser, module, sampler, image_seeds(0, 0, batch_size))  # brings an ensemble's experts in
    if next(module.parameters()).is_cuda:
        others = torch.cuda.memory_allocated() - _weight_bytes(module)  # of whatever else lies on the device
        torch.cuda.reset_peak_memory_stats()
        sample(denoiser, module, sampler, image_seeds(0, 0, batch_size))
        return int(torch.cuda.max_memory_allocated()) - others
    counter = _LiveBytes()
    # First, so that a view of them that an operation returns is not counted as memory of its own.
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        counter.add(tensor)
    with counter:
        sample(denoiser, module, sampler, image_seeds(0, 0, batch_size))
    return counter.peak


def _weight_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in itertools.chain(module.parameters(), module.buffers()))


def latency(denoiser: Denoiser, module: nn.Module, sampler: SamplerSettings, batch_size: int) -> tuple[float, float]:
    """Milliseconds to sample one batch, divided by the sampler's steps: median and half the range over repeats."""
    steps = len(make_scheduler(denoiser, sampler).timesteps)
    times = []
    for repeat in range(REPEATS + 1):
        started = time.perf_counter()
        sample(denoiser, module, sampler, image_seeds(repeat, 0, batch_size))
        if next(module.parameters()).is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1000 / steps)
    return _middle(times[1:])  # the first one warms caches, and loads an ensemble's experts


def _middle(times: Sequence[float]) -> tuple[float, float]:
    return statistics.median(times), (max(times) - min(times)) / 2


def load_time(loaders: Sequence[Callable[[], nn.Module]]) -> tuple[float, float]:
    """Milliseconds from files to models ready to run, all of a served model's: median and half the range over repeats.

    The first time, which brings the files into the page cache, does not count. One model after another is loaded and
    let go, so that no more memory is needed than for one.
    """
    return _middle([sum(map(_load_once, loaders)) for _ in range(LOADS + 1)][1:])


def _load_once(load: Callable[[], nn.Module]) -> float:
    started = time.perf_counter()
    module = load()
    for weight in module.parameters():
        weight.detach().flatten()[:: PAGE // weight.element_size()].sum()  # what is mapped from a file is read only now
    if next(module.parameters()).is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


def disk(folders: list[Path]) -> int:
    """Bytes of the weight files that serve the model."""
    return sum(f.stat().st_size for folder in folders for f in folder.glob("*.safetensors"))
