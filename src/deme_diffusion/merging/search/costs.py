"""What a search costs, in evaluations by FD and of the loss: known before any training. No torch."""

from __future__ import annotations

import math
from typing import NamedTuple

from deme_diffusion.config import MergeSettings
from deme_diffusion.merging.search.objective import Candidate
from deme_diffusion.merging.search.proposals import always, grid_values
from deme_diffusion.merging.search.space import Space

DERIVED = ("least_squares", "gradient")
"""Searches that need to know how the merged weights depend on w."""
SAMPLED = ("cma_es", "tpe")
"""Searches that go on until the budget."""
GRADIENT = 3
"""A gradient on all points in evaluations of the loss: its forward pass, and a backward pass of about two."""
SAME_POINTS = 5
"""Steps of a gradient search on one share of the points; then others are taken."""


class Cost(NamedTuple):
    """Candidates that FD judges, and evaluations of the loss, or their worth."""

    scored: int
    losses: float


def starts_at_least_squares(space: Space, settings: MergeSettings) -> bool:
    """Whether a search that moves asks for the normal equations first: of task arithmetic only."""
    moves = settings.search in ("gradient", *SAMPLED)
    return moves and settings.start == "least_squares" and space.default is None


def judges(settings: MergeSettings) -> bool:
    """Whether another objective than FD picks the finalists."""
    return settings.objective != "fd" and settings.search not in (*DERIVED, "none")


def asks_loss(space: Space, settings: MergeSettings) -> bool:
    """Whether a search ever asks the fixed-noise loss."""
    return settings.search in DERIVED or judges(settings) or starts_at_least_squares(space, settings)


def tried(space: Space) -> list[Candidate]:
    """What is tried whatever the search: w = 0, uniform, each one-hot, and the method's own weights."""
    own = [] if space.default is None else [Candidate(list(space.default), "the method's own")]
    proposals = [*always(space.num_experts), *own]
    if space.fixed:
        proposals[0] = Candidate(proposals[0].weights, f"{proposals[0].source}, with what the recipe fixes")
    return space.once(proposals)


def reserved(space: Space, settings: MergeSettings) -> int:
    """Evaluations by FD that a search ends with, beside those that it makes: the base's own where w = 0 is not it."""
    last = settings.finalists if judges(settings) else 2 if settings.search == "gradient" else 0
    return len(tried(space)) + space.fixed + last


def start_cost(space: Space, settings: MergeSettings) -> int:
    """Evaluations of the loss that the least squares takes which a search is, or starts at; 0 where there is none.

    The normal equations are N + 1 forward passes a point, there and in each Gauss-Newton round, with two losses.
    """
    if settings.search != "least_squares" and not starts_at_least_squares(space, settings):
        return 0
    return space.num_experts + 1 + settings.gauss_newton_rounds * (space.num_experts + 3)


def population(num_experts: int) -> int:
    """Points of a generation of CMA-ES (Hansen 2016, Table 1)."""
    return 4 + int(3 * math.log(max(2, num_experts)))


def needed(space: Space, settings: MergeSettings) -> int:
    """Evaluations of a search as far as they are known; one that goes on until the budget: to a proposal of its own.

    Least squares without further rounds costs less than the candidates that are scored, and is not counted.
    """
    start = start_cost(space, settings)
    own: dict[str, int] = {
        "grid": len(settings.grid_values) ** space.num_experts,
        "least_squares": len(settings.scales) + (start if settings.gauss_newton_rounds else 0),
        "gradient": start + 2 * GRADIENT + 1,  # where it begins, a step of at most all points, where it ends
        "cma_es": start + 1 + population(space.num_experts),
        "tpe": start + 2,  # where it begins is no proposal of its own
    }
    return reserved(space, settings) + own.get(settings.search, 0)


def expected(space: Space, settings: MergeSettings, share: float = 1.0) -> Cost:
    """What a search will have asked, unless it ends before its budget; `share`: of all points, in a gradient's step."""
    last, start = reserved(space, settings), start_cost(space, settings)
    left = settings.max_evaluations - last - start
    begun = int(settings.bounds is None and settings.granularity == "model" and not start)  # at what is tried anyway
    if settings.search == "least_squares":
        return Cost(last + len(set(settings.scales)), start)
    if settings.search == "gradient":
        steps = settings.gradient_steps + math.ceil(settings.gradient_steps / SAME_POINTS) - 1
        return Cost(last - begun, start + min(left, GRADIENT + 1 + GRADIENT * share * steps))
    if settings.search == "none":
        return Cost(last, 0)
    if settings.search == "grid":
        own, begun = _new_points(space, settings), 0
    elif settings.search == "tpe":
        own = left
    else:
        own = 1 + (left - 1) // population(space.num_experts) * population(space.num_experts)
    if judges(settings):
        return Cost(last - settings.finalists + min(settings.finalists, own - begun), start + own)
    return Cost(last + own - begun, start)


def _new_points(space: Space, settings: MergeSettings) -> int:
    """Points of the grid that are not tried anyway."""
    values = set(map(float, grid_values(settings)))
    points: int = len(values) ** space.num_experts
    return points - sum(values.issuperset(c.weights) for c in tried(space))
