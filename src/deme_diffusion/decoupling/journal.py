"""What a training writes down: losses per range in JSONL, each step once, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from deme_diffusion.decoupling.step import StepLosses
from deme_diffusion.files import truncate_jsonl

LOSSES, VALIDATION = "loss.jsonl", "validation.jsonl"


class Journal:
    """Opened after `after` finished steps: whatever a killed run wrote beyond them is cut off first."""

    def __init__(
        self, folder: Path, ranges: list[str], *, after: int, board_every: int = 1, active: bool = True
    ) -> None:
        self.active, self._after, self._folder = active, after, folder
        self._names = ranges
        self._files: dict[str, TextIO] = {}
        self._board_every = board_every
        self._board: Any = None

    def __enter__(self) -> Self:
        if self.active:
            from torch.utils.tensorboard import SummaryWriter

            self._folder.mkdir(parents=True, exist_ok=True)
            for name in (LOSSES, VALIDATION):
                path = self._folder / name
                if path.exists():
                    truncate_jsonl(path, lambda record: record["step"] <= self._after)
                self._files[name] = path.open("a", buffering=1)  # a line at once, for those who watch
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._after + 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.active:
            self.flush()
            for file in self._files.values():
                file.close()
            self._board.close()

    def step(
        self,
        step: int,
        losses: list[StepLosses],
        learning_rate: float,
        gradient_norm: float,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """One optimizer step: means over its micro-batches, and the denoising loss of each range drawn.

        `weights` are a multi-task method's, by cluster, where they are to be told.
        """
        if not self.active:
            return
        ranges: dict[str, list[float]] = {}
        for part in losses:
            for index, loss in part.by_range().items():
                ranges.setdefault(self._names[index], []).append(loss)
        record = {
            "loss": _mean([float(part.loss.mean()) for part in losses]),
            "denoising": _mean([float(part.denoising.mean()) for part in losses]),
            "consistency": _mean([float(part.consistency.mean()) for part in losses]),
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
        }
        self._write(LOSSES, step, record, {name: _mean(values) for name, values in ranges.items()}, weights)

    def validation(self, step: int, losses: list[float], overall: float, own: float) -> None:
        """One validation: the fixed-noise loss of each range, over [0, T), and over the training's own timesteps."""
        if self.active:
            ranges = dict(zip(self._names, losses, strict=True))
            self._write(VALIDATION, step, {"validation": overall, "own": own}, ranges)

    def flush(self) -> None:
        """Onto the disk: a checkpoint that says `step` must find its lines."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def _write(
        self,
        name: str,
        step: int,
        record: Mapping[str, float],
        ranges: Mapping[str, float],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        line = {"step": step, **_finite(record), "ranges": _finite(ranges)}
        line |= {"weights": _finite(weights)} if weights else {}
        self._files[name].write(json.dumps(line, allow_nan=False) + "\n")
        for cluster, weight in (weights or {}).items():
            self._board.add_scalar(f"weight {cluster}", weight, step)
        if name == LOSSES and step % self._board_every:
            return  # the lines above hold every step; a board of every step costs 2% of a small model's time
        for key, value in {**record, **{f"{name.removesuffix('.jsonl')} {r}": v for r, v in ranges.items()}}.items():
            if math.isfinite(value):
                self._board.add_scalar(key, value, step)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _finite(record: Mapping[str, float]) -> dict[str, float | None]:
    """What overflowed in fp16 as null: JSON has neither infinity nor NaN."""
    return {key: value if math.isfinite(value) else None for key, value in record.items()}
