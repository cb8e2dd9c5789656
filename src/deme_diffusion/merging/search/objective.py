"""What a search asks and what it answers with. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from deme_diffusion.merging.selection import MergeWeights

Vector = list[float]
Array = npt.NDArray[np.float64]
Given = MergeWeights | Sequence[float]
Rules = Mapping[str, tuple[float, ...]]


class Objective(Protocol):
    """What a search asks, on the search split only; lower is better."""

    def value(self, weights: Given) -> float:
        """The score of one candidate."""


class Differentiable(Protocol):
    """An objective whose derivative in w is known, on all of its points or on a share that a step picks."""

    def gradient(self, weights: Given, step: int | None = None) -> tuple[float, Rules]:
        """(value, pattern -> dL/dw of length N); the derivative in the weights without a pattern stands under ''."""

    def gradient_cost(self, step: int | None = None) -> float:
        """How many evaluations of the value a gradient takes as long as."""


class Quadratic(Protocol):
    """An objective whose first-order model in w is known in closed form."""

    def normal_equations(self, at: Given | None = None) -> tuple[Array, Array]:
        """(A, b), A (N, N) and b (N,): || eps - eps_at - sum_i (w_i - at_i) a_i ||^2 is least where A w = b.

        a_i = d eps / d w_i at `at`; from one expert alone to the next where that is None, which means 0.
        """

    def equations_cost(self) -> float:
        """How many evaluations of the value one set takes as long as."""


@dataclass(frozen=True)
class Candidate:
    """Weights to score, by pattern as well where `rules` says so, and who proposed them."""

    weights: Vector
    source: str
    rules: Rules = field(default_factory=dict)

    @property
    def merge_weights(self) -> MergeWeights:
        """As a merge takes them."""
        return MergeWeights(tuple(self.weights), self.rules)


@dataclass(frozen=True)
class Trial:
    """A scored candidate."""

    weights: Vector
    source: str
    value: float
    rules: Rules = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"weights": self.weights, "source": self.source, "value": self.value, **_rules(self.rules)}


def _rules(rules: Rules) -> dict[str, Any]:
    return {"rules": {pattern: list(values) for pattern, values in rules.items()}} if rules else {}
