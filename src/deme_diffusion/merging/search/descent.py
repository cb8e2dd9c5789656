"""Gradient descent on the weights (METHOD.md section 8): one backward pass gives dL/dw for every expert and group."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from deme_diffusion.config import MergeSettings
from deme_diffusion.errors import UserError
from deme_diffusion.merging.search.costs import SAME_POINTS
from deme_diffusion.merging.search.objective import Array, Candidate, value_of
from deme_diffusion.merging.search.space import Space
from deme_diffusion.merging.search.start import start

log = logging.getLogger(__name__)
BETAS = (0.8, 0.99)
"""Adam's: its memory is five steps, not ten, since a whole descent is a few dozen."""


def gradient(loss: Any, space: Space, settings: MergeSettings) -> Iterator[Candidate]:
    """Where the descent ends and where it began, the lower loss on all points first: FD may say otherwise.

    `loss` is Differentiable, Objective and Quadratic.
    """
    first = start(loss, space, settings)
    begun = space.candidate(first, "gradient, start")
    if not loss.affords(loss.gradient_cost() + loss.gradient_cost(0) + 1):
        log.info("gradient: the budget ends before its first step")
        yield begun
        return
    try:
        before, rows = loss.gradient(begun.merge_weights)
    except UserError as error:
        log.warning("gradient: it cannot begin at %s: %s", begun.weights, error)
        yield begun
        return
    ended = space.candidate(_descended(loss, space, settings, first, space.rows(rows)), "gradient")
    after = value_of(loss, ended)
    log.info("gradient: %.6g before, %.6g after", before, after)
    yield from (ended, begun) if after < before else (begun, ended)


def _descended(loss: Any, space: Space, settings: MergeSettings, first: Array, slope: Array) -> Array:
    """Adam (Kingma and Ba 2015) with a cosine rate, on shares of the points, their noise taken out.

    The slope at `first` is known on all points. A step adds by how much its share's slope has changed since there, so
    that only the curvature is left to the share (SVRG, Johnson and Zhang 2013). It ends at the last point of a model.
    """
    last, point, mean, square = first, first, np.zeros_like(first), np.zeros_like(first)
    for step in range(settings.gradient_steps):
        share = step // SAME_POINTS
        if not loss.affords((2 if step else 1) * loss.gradient_cost(share) + 1):  # the first one is at `first` itself
            log.info("gradient: the budget ends after %d of %d steps", step, settings.gradient_steps)
            break
        try:
            now, then = (_slope(loss, space, at, share) for at in (point, first))
        except UserError as error:
            log.warning("gradient: step %d of %d led to no model: %s", step, settings.gradient_steps, error)
            return last
        last, ahead = point, now - then + slope
        mean = BETAS[0] * mean + (1 - BETAS[0]) * ahead
        square = BETAS[1] * square + (1 - BETAS[1]) * ahead**2
        scale = np.sqrt(square / (1 - BETAS[1] ** (step + 1)))
        move = np.divide(mean / (1 - BETAS[0] ** (step + 1)), scale, out=np.zeros_like(mean), where=scale > 0)
        rate = settings.gradient_learning_rate * (1 + math.cos(math.pi * step / settings.gradient_steps)) / 2
        point = space.clip(point - rate * move)
    return point


def _slope(loss: Any, space: Space, point: Array, share: int) -> Array:
    rows: Array = space.rows(loss.gradient(space.candidate(point, "").merge_weights, share)[1])
    return rows
