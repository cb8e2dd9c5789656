"""Where a search that moves begins."""

from __future__ import annotations

import logging
from typing import Any

from deme_diffusion.config import MergeSettings
from deme_diffusion.merging.search.closed_form import solved
from deme_diffusion.merging.search.objective import Array
from deme_diffusion.merging.search.proposals import uniform_weights
from deme_diffusion.merging.search.space import Space

log = logging.getLogger(__name__)


def start(loss: Any, space: Space, settings: MergeSettings) -> Array:
    """The point (groups, N) that `merge.start` names; `loss` is Quadratic, and asked for least squares only.

    Least squares speaks of task arithmetic: of another method it is that method's own weights.
    """
    if settings.start == "zero":
        return space.spread([0.0] * space.num_experts)
    if settings.start == "least_squares" and space.default is None:
        return space.spread([float(w) for w in solved(loss, space, settings)[0]])
    weights = space.default or uniform_weights(space.num_experts)
    if settings.start == "least_squares":
        log.info("start: least squares is of task arithmetic only; the search begins at %s", list(weights))
    return space.spread(weights)
