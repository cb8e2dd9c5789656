"""What a search asks and what it answers with. No torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from deme_diffusion.errors import UserError
from deme_diffusion.merging.selection import MergeWeights

log = logging.getLogger(__name__)

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
    """A scored candidate; infinite, for a reason, where the weights make no model or no number comes of it."""

    weights: Vector
    source: str
    value: float
    rules: Rules = field(default_factory=dict)
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the value is null where it is no number, with the reason."""
        value = self.value if math.isfinite(self.value) else None
        why = {} if value is not None else {"reason": self.reason or f"its value is {self.value}"}
        return {"weights": self.weights, "source": self.source, "value": value, **why, **_rules(self.rules)}


def value_of(objective: Any, candidate: Candidate) -> float:
    """The value; infinite for weights whose model is none, or is not a number."""
    try:
        value = float(objective.value(candidate.merge_weights))
    except UserError as error:
        log.info("%s %s cannot be used: %s", candidate.source, candidate.weights, error)
        return math.inf
    return value if math.isfinite(value) else math.inf


def finite(answer: object) -> bool:
    """Whether an objective's answer holds numbers only: a value, rows, or both by pattern."""
    if isinstance(answer, dict):
        return all(map(finite, answer.values()))
    if isinstance(answer, list | tuple):
        return all(map(finite, answer))
    return isinstance(answer, int | float) and math.isfinite(answer)


def _rules(rules: Rules) -> dict[str, Any]:
    return {"rules": {pattern: list(values) for pattern, values in rules.items()}} if rules else {}
