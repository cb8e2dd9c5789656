"""What a user is told of the tensors that a merge leaves alone, and how far a long merge is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from deme_diffusion.merging.vectors import finite

if TYPE_CHECKING:
    from deme_diffusion.merging.apply import Merger
    from deme_diffusion.merging.selection import MergeWeights

log = logging.getLogger(__name__)
EVERY = 15.0
"""Seconds between two lines of progress."""


def note_buffers(merger: Merger, weights: MergeWeights) -> None:
    """Keep for the user which experts' whole numbers differ from the base's, and are not kept."""
    names = merger.base.keys()
    keys = [key for key in names if not merger.base.dtype(key).is_floating_point and weights.kept(key) is None]
    for expert in merger.experts:
        if differ := [key for key in keys if not _equal(merger.base.tensor(key), expert.tensor(key))]:
            named = ", ".join(differ[:3]) + (", ..." if len(differ) > 3 else "")
            _note(
                merger,
                f"{expert.path}: whole numbers that differ from the base's, and stay the base's: {named}; "
                "keep takes an expert's",
            )


def note_left_out(merger: Merger, key: str, weights: MergeWeights, parts: Sequence[torch.Tensor]) -> None:
    """Keep for the user, once an expert, that it is broken where a weight of 0 leaves it out."""
    whose, values = merger.source(key, weights)
    for expert, value, part in zip(merger.experts, values, parts[1:], strict=True):
        told = f"{expert.path}: NaN or infinity"
        if value or whose not in (None, "base") or finite(part) or _equal(parts[0], part):
            continue
        if not any(note.startswith(told) for note in merger.notes):
            _note(merger, f"{told} in {key}; a weight of 0 leaves it out")


class Progress:
    """A line now and then of how many parameters are merged."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock, self._last = total, clock, clock()
        self._begun, self._key = 0, ""

    def at(self, key: str) -> None:
        """A parameter's turn, or that of its next slice."""
        if key != self._key:
            self._begun, self._key = self._begun + 1, key
            if (now := self._clock()) - self._last >= EVERY:
                log.info("%d of %d parameters merged", self._begun - 1, self._total)
                self._last = now


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    kind = torch.promote_types(one.dtype, other.dtype) if one.dtype != other.dtype else one.dtype
    return torch.equal(one.to(kind), other.to(kind))


def _note(merger: Merger, note: str) -> None:
    if note not in merger.notes:
        merger.notes.append(note)
