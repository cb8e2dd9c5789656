"""Numbers on a grid of models, cell by cell: fixed noise, resumable, with a progress bar."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from deme_diffusion.analysis.directions import inner
from deme_diffusion.analysis.paired import Changes, Paired, told
from deme_diffusion.division import Runs
from deme_diffusion.files import append_jsonl, read_jsonl
from deme_diffusion.models.denoiser import Noised
from deme_diffusion.models.objective import FixedNoise

log = logging.getLogger(__name__)
Array = npt.NDArray[np.float64]
CELLS = "cells.jsonl"
LOGGED_EVERY = 30.0
"""Seconds between two lines of a progress bar where stderr is no terminal, but a log."""
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

    def rows(
        self,
        row_at: Callable[[float, float], Sequence[float]],
        partial: Path,
        *,
        title: str,
        header: Mapping[str, Any],
    ) -> Array:
        """A row of K numbers in every cell, (len(a), len(b), K); NaN where one is not finite, which is told.

        Cells go to a journal in the folder `partial` as they are done, those that it holds under the same `header` are
        not computed again.
        """
        journal = partial / CELLS
        done = self._begun(journal, header)
        missing = [cell for cell in self.cells if cell not in done]
        seconds = 0.1 if sys.stderr.isatty() else LOGGED_EVERY
        bar = tqdm(missing, title, len(self.cells), initial=len(done), unit="cell", position=_line(),
                   mininterval=seconds, maxinterval=max(seconds, 10.0))  # fmt: skip
        for i, j in bar:
            done[i, j] = [plain(value) for value in row_at(float(self.a[i]), float(self.b[j]))]
            append_jsonl(journal, {"cell": [i, j], "row": done[i, j]})
        rows = np.array([[done[i, j] for j in range(len(self.b))] for i in range(len(self.a))], np.float64)
        if bad := int(np.isnan(rows).any(axis=2).sum()):
            log.warning("%s: the loss of %d of %d cells is no number", title, bad, len(self.cells))
        return rows

    def lowest(self, values: Array) -> tuple[int, int] | None:
        """The cell of the least value (len(a), len(b)), of equal ones the nearest to (0, 0); None where all are NaN."""
        finite = [cell for cell in self.cells if np.isfinite(values[cell])]
        return min(finite, key=lambda cell: float(values[cell])) if finite else None

    def _begun(self, journal: Path, header: Mapping[str, Any]) -> dict[tuple[int, int], list[float | None]]:
        """The cells of an interrupted stage; a journal of other cells or noise begins anew."""
        expected = {**header, "a": self.a.tolist(), "b": self.b.tolist()}
        first, *records = read_jsonl(journal) or [{}]
        if first == expected:
            return {(record["cell"][0], record["cell"][1]): record["row"] for record in records}
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


def least(changes: Changes, row: int, grid: Grid) -> dict[str, Any] | None:
    """The least loss of a grid over [0, T) (row 0) or in a range: where, its change from the base's, and `tested`, the
    change with its standard error where the cell is picked on one half of the images and judged on the other.

    The first is the least of many noisy numbers, the second is not. None where no cell has a finite loss.
    """
    if (cell := grid.lowest(changes.losses[row])) is None:
        return None
    picked = [grid.lowest(changes.half(half, row)) for half in (0, 1)]
    tested = told(*changes.tested([one for one in picked if one], row)) if all(picked) else told(np.nan, np.nan)
    at = {"loss": float(changes.losses[row][cell]), "a": float(grid.a[cell[0]]), "b": float(grid.b[cell[1]])}
    return {**at, "change": plain(float(changes.change[row][cell])), "tested": tested}


def identity(paired: Paired, directions: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """What a journal's cells are around: the base's losses and the directions' inner products, to six digits."""
    gram = [inner(one, other) for k, one in enumerate(directions) for other in directions[: k + 1]]
    numbers = {"base": paired.base.mean(1).tolist(), "gram": gram}
    return {name: [plain(float(f"{value:.5e}")) for value in values] for name, values in numbers.items()}


def plain(value: float) -> float | None:
    """A number for JSON: null where it is none."""
    return float(value) if math.isfinite(value) else None
