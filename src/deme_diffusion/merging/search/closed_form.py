"""Least squares on the model that is linear in w (METHOD.md section 8), and again, linearised where it led."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from deme_diffusion.config import MergeSettings
from deme_diffusion.merging.search.objective import Array, Candidate
from deme_diffusion.merging.search.space import Space

log = logging.getLogger(__name__)


def least_squares_weights(a: Array, b: Array, ridge: float) -> Array:
    """The minimiser with a ridge towards 0: (A + lambda I) w = b, lambda relative to the mean of A's diagonal."""
    damping = ridge * float(np.trace(a)) / len(b)
    return np.asarray(np.linalg.lstsq(a + damping * np.eye(len(b)), b, rcond=None)[0], dtype=np.float64)


def least_squares(objective: Any, space: Space, settings: MergeSettings) -> Iterator[Candidate]:
    """The closed form and its multiples: lower loss is not lower FD, so the metric decides.

    `objective` is Quadratic and, for Gauss-Newton rounds, Objective.
    """
    weights, rounds = solved(objective, space, settings)
    name = "least squares" if not rounds else f"least squares, {rounds} Gauss-Newton"
    for scale in settings.scales:
        yield space.candidate(scale * weights, f"{name} x {scale:g}")


def solved(objective: Any, space: Space, settings: MergeSettings) -> tuple[Array, int]:
    """The weights (N,) and how many Gauss-Newton rounds made them better: one that does not is not taken."""
    a, b = objective.normal_equations()
    weights = space.clip(least_squares_weights(a, b, settings.ridge))
    for done in range(settings.gauss_newton_rounds):
        if not objective.affords(objective.equations_cost() + 2):
            log.info("least squares: the budget ends before Gauss-Newton round %d", done + 1)
            return weights, done
        at = [float(w) for w in weights]
        a, b = objective.normal_equations(at)
        step = space.clip(least_squares_weights(a, b, settings.ridge))
        if not objective.value([float(w) for w in step]) < objective.value(at):
            log.info("least squares: Gauss-Newton round %d lowers the loss no more", done + 1)
            return weights, done
        weights = step
    return weights, settings.gauss_newton_rounds
