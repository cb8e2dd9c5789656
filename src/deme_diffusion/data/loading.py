"""The order of training: micro-batches as a pure function of (seed, step), whatever the workers and interruptions."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from deme_diffusion.rng import image_at, normals

Batch = dict[str, Any]
Shape = tuple[int, ...]
"""What a split gives (`image`, or `latent` and `condition`; `caption` or `label`), and `noise` as the model's samples.

`step`, `first`: within step, its global sample indices begin at first.
"""


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


class Trained(Protocol):
    """What a training reads: `data.splits.Split`, or one that was encoded beforehand."""

    def __len__(self) -> int: ...

    def training_batch(
        self, positions: Sequence[int], *, seed: int, purpose: str, step: int, first: int, empty: float = 0.0
    ) -> dict[str, Any]: ...


class _MicroBatches(Dataset[Batch]):
    """Item k is the k-th micro-batch of the whole training run."""

    def __init__(self, split: Trained, order: Order, seed: int, shape: Shape | None, empty: float) -> None:
        self.split, self.order, self.seed, self.shape, self.empty = split, order, seed, shape, empty

    def __getitem__(self, index: int) -> Batch:
        step, micro = divmod(index, self.order.accumulation)
        first = self.order.first(micro)
        slots = range(step * self.order.step_size + first, step * self.order.step_size + first + self.order.batch_size)
        picked = [image_at(self.seed, slot, len(self.split)) for slot in slots]
        keyed: dict[str, Any] = {"seed": self.seed, "purpose": "augment", "step": step, "first": first}
        batch = self.split.training_batch(picked, **keyed, empty=self.empty)
        shape = self.shape or tuple(batch["image"].shape[1:])
        # Drawn here, so that loader workers prepare it ahead: half the cost of a large batch is its noise.
        noise = normals(self.seed, "noise", step, first, len(picked), shape)
        return {**batch, "noise": torch.from_numpy(noise), "step": step, "first": first}


def steps(
    split: Trained,
    order: Order,
    *,
    seed: int,
    start: int,
    stop: int,
    workers: int = 0,
    shape: Shape | None = None,
    empty: float = 0.0,
) -> Iterator[list[Batch]]:
    """For each optimizer step in [start, stop) its micro-batches, loaded ahead by `workers` processes.

    `shape`: of a sample's noise; None: of the images. `empty`: share of samples without their prompt.
    """
    batches = _MicroBatches(split, order, seed, shape, empty)
    indices = range(start * order.accumulation, stop * order.accumulation)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # or the loader draws from the global one, which dropout relies on
    )
    micro: list[Batch] = []
    for batch in loader:
        micro.append(batch)
        if len(micro) == order.accumulation:
            yield micro
            micro = []


def leave_signals_to_the_parent(worker: int) -> None:
    """What a loader process starts with."""
    # A terminal or a scheduler signals all processes at once, and the parent still needs batches until its checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
