"""The search for merge weights (Sec. 3.3): proposals from an injected objective, the answer by the true metric.

Whatever the search, w = 0 (the base), uniform weights and every one-hot are scored too, so that a search cannot
return something worse, on the search split, than what needs no search.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from deme_diffusion.config import MergeSettings
from deme_diffusion.errors import UserError

Vector = list[float]
Array = npt.NDArray[np.float64]


class Objective(Protocol):
    """What a search asks, on the search split only; lower is better."""

    def value(self, weights: Sequence[float]) -> float:
        """The score of one candidate."""


class Quadratic(Protocol):
    """An objective whose first-order model in w is known in closed form."""

    def normal_equations(self) -> tuple[Array, Array]:
        """(A, b), A (N, N) and b (N,): || eps - eps_theta - sum_i w_i a_i ||^2 is least where A w = b."""


@dataclass(frozen=True)
class Candidate:
    """Weights to score, and who proposed them."""

    weights: Vector
    source: str


@dataclass(frozen=True)
class Trial:
    """A scored candidate."""

    weights: Vector
    source: str
    value: float


def uniform_weights(num_experts: int) -> Vector:
    """w_i = 1/N."""
    return [1.0 / num_experts] * num_experts


def always(num_experts: int) -> Iterator[Candidate]:
    """w = 0, uniform, each one-hot."""
    yield Candidate([0.0] * num_experts, "w = 0")
    if num_experts > 1:
        yield Candidate(uniform_weights(num_experts), "uniform")
    for i in range(num_experts):
        yield Candidate([float(j == i) for j in range(num_experts)], f"one-hot {i}")


def least_squares_weights(a: Array, b: Array, ridge: float) -> Array:
    """The minimiser with a ridge towards 0: (A + lambda I) w = b, lambda relative to the mean of A's diagonal."""
    damping = ridge * float(np.trace(a)) / len(b)
    return np.asarray(np.linalg.lstsq(a + damping * np.eye(len(b)), b, rcond=None)[0], dtype=np.float64)


def least_squares(objective: Quadratic, settings: MergeSettings) -> Iterator[Candidate]:
    """The closed form (METHOD.md section 8) and its multiples: lower loss is not lower FD, so the metric decides."""
    weights = least_squares_weights(*objective.normal_equations(), settings.ridge)
    for scale in settings.scales:
        yield Candidate([float(scale * w) for w in weights], f"least squares x {scale:g}")


def grid(num_experts: int, settings: MergeSettings) -> Iterator[Candidate]:
    """Every combination of `grid_values`, as the paper searches."""
    for point in itertools.product(settings.grid_values, repeat=num_experts):
        yield Candidate(list(point), "grid")


def check_evaluations(num_experts: int, settings: MergeSettings) -> None:
    """Raises UserError when a search would score more candidates than `max_evaluations`: known before any training."""
    points = {"grid": len(settings.grid_values) ** num_experts, "least_squares": len(settings.scales)}
    if (count := points.get(settings.search, 0) + len(list(always(num_experts)))) > settings.max_evaluations:
        raise UserError(
            f"merge.search {settings.search}: {count} candidates for {num_experts} experts, more than "
            f"merge.max_evaluations={settings.max_evaluations}; use fewer grid_values or scales, or raise the limit"
        )


def candidates(num_experts: int, settings: MergeSettings, quadratic: Callable[[], Quadratic]) -> list[Candidate]:
    """All that a search will score, each point once. Raises UserError above `max_evaluations`."""
    check_evaluations(num_experts, settings)
    proposals = list(always(num_experts))
    if settings.search == "grid":
        proposals += grid(num_experts, settings)
    elif settings.search == "least_squares":
        proposals += least_squares(quadratic(), settings)
    unique = {tuple(c.weights): c for c in reversed(proposals)}
    return [c for c in proposals if unique[tuple(c.weights)] is c]


def score(proposals: Sequence[Candidate], objective: Objective, known: Sequence[Trial] = ()) -> Iterator[Trial]:
    """Each candidate scored, those that an interrupted search has scored already taken from `known`."""
    done = {tuple(trial.weights): trial.value for trial in known}
    for proposal in proposals:
        value = done.get(tuple(proposal.weights))
        yield Trial(proposal.weights, proposal.source, objective.value(proposal.weights) if value is None else value)


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of least value; of equals the first, so that w = 0 wins a tie."""
    return min(trials, key=lambda trial: trial.value)
