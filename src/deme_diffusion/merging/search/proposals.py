"""What costs nothing to propose: w = 0, uniform, each one-hot; the grid; the closed form of the fixed-noise loss."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import numpy as np

from deme_diffusion.config import MergeSettings
from deme_diffusion.merging.search.objective import Candidate, Vector
from deme_diffusion.merging.search.space import Space

log = logging.getLogger(__name__)


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


def grid_values(settings: MergeSettings) -> Vector:
    """What a weight takes in the grid: within the bounds, where there are any."""
    return [float(value) for value in Space(1, settings.bounds).clip(np.array(settings.grid_values))]


def grid(num_experts: int, settings: MergeSettings) -> Iterator[Candidate]:
    """Every combination of `grid_values`, as the paper searches."""
    values = grid_values(settings)
    if tuple(values) != settings.grid_values:
        log.info("grid: merge.bounds=%s makes grid_values %s", list(settings.bounds or ()), values)
    for point in itertools.product(values, repeat=num_experts):
        yield Candidate(list(point), "grid")
