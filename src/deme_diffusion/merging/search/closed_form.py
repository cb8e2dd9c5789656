"""Least squares on the model that is linear in w (METHOD.md section 8), and again, linearised where it led."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from deme_diffusion.config import MergeSettings
from deme_diffusion.errors import UserError
from deme_diffusion.merging.search.objective import Array, Candidate, value_of
from deme_diffusion.merging.search.space import Space

log = logging.getLogger(__name__)


def least_squares_weights(a: Array, b: Array, ridge: float, bounds: tuple[float, float] | None = None) -> Array:
    """The minimiser of w A w - 2 b w + lambda w w within the bounds, lambda relative to the mean of A's diagonal."""
    damped = a + ridge * float(np.trace(a)) / len(b) * np.eye(len(b))
    free = np.asarray(np.linalg.lstsq(damped, b, rcond=None)[0], dtype=np.float64)
    if bounds is None or bool(((free >= bounds[0]) & (free <= bounds[1])).all()):
        return free
    from scipy.optimize import lsq_linear  # here, for a fast start

    values, vectors = np.linalg.eigh(damped)
    kept = values > max(values[-1], 0.0) * len(b) * np.finfo(np.float64).eps
    if not kept.any():
        return np.clip(free, *bounds)
    root = np.sqrt(values[kept])[:, None] * vectors[:, kept].T  # root^T root = A
    target = vectors[:, kept].T @ b / np.sqrt(values[kept])
    found = lsq_linear(root, target, bounds, method="bvls", tol=1e-14)
    return np.clip(np.asarray(found.x, dtype=np.float64), *bounds)


def least_squares(objective: Any, space: Space, settings: MergeSettings) -> Iterator[Candidate]:
    """The closed form and its multiples: lower loss is not lower FD, so the metric decides.

    `objective` is Quadratic and, for Gauss-Newton rounds, Objective.
    """
    weights, rounds = solved(objective, space, settings)
    name = "least squares" if not rounds else f"least squares, {rounds} Gauss-Newton"
    for scale in settings.scales:
        yield space.candidate(scale * weights, f"{name} x {scale:g}")


def solved(objective: Any, space: Space, settings: MergeSettings) -> tuple[Array, int]:
    """The weights (N,) and how many Gauss-Newton rounds made them better: one that does not is not taken.

    0 where the experts make no equations.
    """
    weights, done = space.clip(np.zeros(space.num_experts)), 0
    try:
        a, b = objective.normal_equations()
        weights = least_squares_weights(a, b, settings.ridge, space.bounds)
        while done < settings.gauss_newton_rounds:
            if not objective.affords(objective.equations_cost() + 2):
                log.info("least squares: the budget ends before Gauss-Newton round %d", done + 1)
                break
            a, b = objective.normal_equations([float(w) for w in weights])
            step = least_squares_weights(a, b, settings.ridge, space.bounds)
            there, here = (value_of(objective, Candidate(each.tolist(), "least squares")) for each in (step, weights))
            if not there < here:
                log.info("least squares: Gauss-Newton round %d lowers the loss no more", done + 1)
                break
            weights, done = step, done + 1
    except UserError as error:
        log.warning("least squares: %s", error)
    return weights, done
