"""Losses on a grid of models, cell by cell: fixed noise, resumable, with a progress bar."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm

from deme_diffusion.config import AnalyzeSettings
from deme_diffusion.division import Runs, from_runs, names_of
from deme_diffusion.files import append_jsonl, read_jsonl
from deme_diffusion.models.denoiser import Noised
from deme_diffusion.models.objective import FixedNoise

log = logging.getLogger(__name__)
Array = npt.NDArray[np.float64]
CELLS = "cells.jsonl"
HELD_BYTES = 2**30
"""Most memory for noised batches that are made once, and held by the CPU, rather than anew for each cell."""


@dataclass(frozen=True)
class Grid:
    """Cells (i, j) that stand at (a[i], b[j])."""

    a: Array
    b: Array

    @property
    def cells(self) -> list[tuple[int, int]]:
        """From the cell nearest to (0, 0) outwards."""
        every = [(i, j) for i in range(len(self.a)) for j in range(len(self.b))]
        return sorted(every, key=lambda cell: (self.a[cell[0]] ** 2 + self.b[cell[1]] ** 2, cell))

    def losses(
        self,
        losses_at: Callable[[float, float], Sequence[float]],
        partial: Path,
        *,
        title: str,
        header: Mapping[str, Any],
    ) -> Array:
        """The losses of each range in every cell, (R, len(a), len(b)); NaN where one is not finite, which is told.

        Cells go to a journal in the folder `partial` as they are done, those that it holds under the same `header` are
        not computed again.
        """
        journal = partial / CELLS
        done = self._begun(journal, header)
        missing = [cell for cell in self.cells if cell not in done]
        bar = tqdm(missing, title, len(self.cells), initial=len(done), unit="cell", position=_line())
        for i, j in bar:
            done[i, j] = [plain(loss) for loss in losses_at(float(self.a[i]), float(self.b[j]))]
            append_jsonl(journal, {"cell": [i, j], "losses": done[i, j]})
        losses = np.array([[done[i, j] for j in range(len(self.b))] for i in range(len(self.a))], np.float64)
        if bad := int(np.isnan(losses).any(axis=2).sum()):
            log.warning("%s: the loss of %d of %d cells is no number", title, bad, len(self.cells))
        return np.moveaxis(losses, 2, 0)

    def _begun(self, journal: Path, header: Mapping[str, Any]) -> dict[tuple[int, int], list[float | None]]:
        """The cells of an interrupted stage; a journal of other cells or noise begins anew."""
        expected = {**header, "a": self.a.tolist(), "b": self.b.tolist()}
        first, *records = read_jsonl(journal) or [{}]
        if first == expected:
            return {(record["cell"][0], record["cell"][1]): record["losses"] for record in records}
        if first:
            log.warning("%s: of other settings; it begins anew", journal)
        journal.unlink(missing_ok=True)
        append_jsonl(journal, expected)
        return {}


def _line() -> int:
    """The line of the terminal for this process's progress bar."""
    return int(os.environ.get("TQDM_POSITION", 0))


# -- noise ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldNoise(FixedNoise):
    """The same points, whose batches are made once."""

    held: Mapping[str, list[Noised]] = field(default_factory=dict)

    def batches(self, runs: Runs, device: torch.device) -> Iterator[Noised]:
        """The noised batches of one range."""
        for noised in self.held[repr(runs)]:
            yield _to(noised, device)


def held(noise: FixedNoise, limit: int = HELD_BYTES) -> FixedNoise:
    """The noise with its batches made once, or as it is where they would take more than `limit` bytes."""
    device, size = next(noise.denoiser.module.parameters()).device, 0
    made: dict[str, list[Noised]] = {}
    for runs in noise.ranges:
        batches = made.setdefault(repr(runs), [])
        for noised in noise.batches(runs, device):
            batches.append(_to(noised, torch.device("cpu")))
            size += sum(tensor.nbytes for tensor in (noised.x_t, noised.t, noised.target, *noised.condition.values()))
            if size > limit:
                return noise
    return HeldNoise(noise.denoiser, noise.split, noise.ranges, noise.settings, noise.batch_size, made)


def _to(noised: Noised, device: torch.device) -> Noised:
    x_t, t, target = (tensor.to(device) for tensor in (noised.x_t, noised.t, noised.target))
    condition = {name: tensor.to(device) for name, tensor in noised.condition.items()}
    return replace(noised, x_t=x_t, t=t, target=target, condition=condition)


def losses_of(noise: FixedNoise, module: nn.Module) -> list[float]:
    """Losses of one module over [0, T), then in each range."""
    losses = noise.losses(module)
    return [noise.overall(losses), *losses]


def overall(noise: FixedNoise, losses: Array) -> Array:
    """(R, ...) losses of the ranges -> over [0, T), each weighted by its timesteps."""
    sizes = [len(from_runs(runs)) for runs in noise.ranges]
    return np.asarray(np.tensordot(np.array(sizes, np.float64), losses, axes=1) / sum(sizes))


def protocol(noise: FixedNoise, settings: AnalyzeSettings) -> dict[str, Any]:
    """What losses are taken on, as figures tell it."""
    return {
        "split": settings.split,
        "num_images": noise.num_images,
        "draws": noise.settings.draws,
        "seed": noise.settings.seed,
        "T": noise.denoiser.num_train_timesteps,
        "ranges": [*names_of(noise.ranges)],
        "points": noise.num_images * noise.settings.draws * len(noise.ranges),
    }


def plain(value: float) -> float | None:
    """A number for JSON: null where it is none."""
    return float(value) if math.isfinite(value) else None
