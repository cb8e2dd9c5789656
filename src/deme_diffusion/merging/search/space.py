"""Where a search looks: a weight an expert, or such a set for each group of parameters, within bounds. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from deme_diffusion.merging.search.objective import Array, Candidate, Rules
from deme_diffusion.merging.table import Method

REST = ""
"""The group without a pattern: what no other group holds."""


@dataclass(frozen=True)
class Space:
    """A point is an array (groups, N). `groups` are patterns; the first one may be REST.

    `shares` are the groups' parts of the parameters: by them the plain weights of a point with several are a mean.
    `default`: the weights that a method other than task arithmetic takes where none are given. `relative`: weights and
    their multiples are the same model. `fixed`: the recipe says what some parameters are, whatever the weights.
    """

    num_experts: int
    bounds: tuple[float, float] | None = None
    groups: tuple[str, ...] = (REST,)
    shares: tuple[float, ...] = (1.0,)
    default: tuple[float, ...] | None = None
    relative: bool = False
    fixed: bool = False

    @classmethod
    def of(
        cls, method: Method, num_experts: int, bounds: tuple[float, float] | None = None, *, fixed: bool = False
    ) -> Self:
        """Where weights of a method are looked for, one an expert."""
        default = None if method.name == "task_arithmetic" else tuple(method.default_weights(num_experts))
        return cls(num_experts, bounds, default=default, relative=method.relative, fixed=fixed)

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

    def model_of(self, candidate: Candidate) -> tuple[Any, ...]:
        """What candidates of one and the same model have in common."""
        rows = [tuple(candidate.weights), *candidate.rules.values()]
        if self.relative:  # to as many digits as tell different weights apart, whatever the rounding of a quotient
            rows = [tuple(float(f"{w / (sum(map(abs, row)) or 1.0):.12g}") for w in row) for row in rows]
        return (*rows, *candidate.rules)

    def once(self, proposals: Sequence[Candidate], known: Sequence[Candidate] = ()) -> list[Candidate]:
        """Each model once, by whom it was proposed first; none of those that are known."""
        unique = {self.model_of(c): c for c in reversed([*known, *proposals])}
        return [c for c in proposals if unique[self.model_of(c)] is c]

    def rows(self, gradient: Rules) -> Array:
        """(groups, N) from what an objective gives by pattern; a group that it says nothing of does not matter."""
        nothing = (0.0,) * self.num_experts
        return np.array([gradient.get(pattern, nothing) for pattern in self.groups], dtype=np.float64)
