"""Where a search looks: a weight an expert, or such a set for each group of parameters, within bounds. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deme_diffusion.merging.search.objective import Array, Candidate, Rules

REST = ""
"""The group without a pattern: what no other group holds."""


@dataclass(frozen=True)
class Space:
    """A point is an array (groups, N). `groups` are patterns; the first one may be REST.

    `shares` are the groups' parts of the parameters: by them the plain weights of a point with several are a mean.
    `default`: the weights that a method other than task arithmetic takes where none are given.
    """

    num_experts: int
    bounds: tuple[float, float] | None = None
    groups: tuple[str, ...] = (REST,)
    shares: tuple[float, ...] = (1.0,)
    default: tuple[float, ...] | None = None

    def spread(self, weights: Sequence[float]) -> Array:
        """The point where every group has these weights."""
        return self.clip(np.tile(np.asarray(weights, dtype=np.float64), (len(self.groups), 1)))

    def clip(self, point: Array) -> Array:
        """The nearest point within the bounds."""
        return point if self.bounds is None else np.clip(point, *self.bounds)

    def candidate(self, point: Array, source: str) -> Candidate:
        """The weights at a point."""
        rows = [tuple(float(w) for w in row) for row in self.clip(point).reshape(len(self.groups), -1)]
        if self.groups == (REST,):
            return Candidate(list(rows[0]), source)
        rules = {pattern: row for pattern, row in zip(self.groups, rows, strict=True) if pattern != REST}
        plain = rows[0] if REST in self.groups else np.average(rows, axis=0, weights=self.shares)
        return Candidate([float(w) for w in plain], source, rules)

    def rows(self, gradient: Rules) -> Array:
        """(groups, N) from what an objective gives by pattern; a group that it says nothing of does not matter."""
        nothing = (0.0,) * self.num_experts
        return np.array([gradient.get(pattern, nothing) for pattern in self.groups], dtype=np.float64)
