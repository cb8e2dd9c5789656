"""The order of training: micro-batches as a pure function of (seed, step), whatever the workers and interruptions."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from deme_diffusion.data.splits import Split
from deme_diffusion.rng import image_at, normals

Batch = dict[str, Any]
"""`image`, `noise`: float32 (b, c, h, w). `step`, `first`: within step, its global sample indices begin at first."""


@dataclass(frozen=True)
class Order:
    """How a step's samples are laid out over accumulation and processes; a step sees `step_size` samples."""

    batch_size: int
    accumulation: int = 1
    process: int = 0
    processes: int = 1

    @property
    def step_size(self) -> int:
        """Samples of one optimizer step, over all micro-batches and processes."""
        return self.batch_size * self.accumulation * self.processes

    def first(self, micro: int) -> int:
        """Index within the step of a micro-batch's first sample."""
        return (micro * self.processes + self.process) * self.batch_size


class _MicroBatches(Dataset[Batch]):
    """Item k is the k-th micro-batch of the whole training run."""

    def __init__(self, split: Split, order: Order, seed: int) -> None:
        self.split, self.order, self.seed = split, order, seed

    def __getitem__(self, index: int) -> Batch:
        step, micro = divmod(index, self.order.accumulation)
        first = self.order.first(micro)
        slots = range(step * self.order.step_size + first, step * self.order.step_size + first + self.order.batch_size)
        picked = [image_at(self.seed, slot, len(self.split)) for slot in slots]
        images = self.split.training_images(picked, seed=self.seed, purpose="augment", step=step, first=first)
        # Drawn here, so that loader workers prepare it ahead: half the cost of a large batch is its noise.
        noise = normals(self.seed, "noise", step, first, len(images), tuple(images.shape[1:]))
        return {"image": images, "noise": torch.from_numpy(noise), "step": step, "first": first}


def steps(split: Split, order: Order, *, seed: int, start: int, stop: int, workers: int = 0) -> Iterator[list[Batch]]:
    """For each optimizer step in [start, stop) its micro-batches, loaded ahead by `workers` processes."""
    batches = _MicroBatches(split, order, seed)
    indices = range(start * order.accumulation, stop * order.accumulation)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # or the loader draws from the global one, which dropout relies on
    )
    micro: list[Batch] = []
    for batch in loader:
        micro.append(batch)
        if len(micro) == order.accumulation:
            yield micro
            micro = []


def _leave_signals_to_the_parent(worker: int) -> None:
    # A terminal or a scheduler signals all processes at once, and the parent still needs batches until its checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
