"""Densities of t on a schedule of T steps, as diffusers' flow-matching training scripts draw them. No torch.

They draw u in [0, 1) and train at the scheduler's int(u T)-th timestep, whose table descends: a u near 0 is all noise.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from deme_diffusion.errors import UserError

Array = npt.NDArray[np.float64]
Scheme = Literal["uniform", "logit_normal", "mode"]
MODE_SCALES = (-1.0, 2 / (math.pi - 2))
"""Between these the mode's u is a monotone function of uniform numbers (Esser et al. 2024, Sec. 3.1)."""


def index_density(scheme: Scheme, num_timesteps: int, *, mean: float, std: float, scale: float) -> Array:
    """(T,) probability of index i, which ascends in noise, so that it is u in [1 - (i + 1) / T, 1 - i / T)."""
    edges = np.arange(num_timesteps + 1) / num_timesteps
    if scheme == "uniform":
        return np.full(num_timesteps, 1 / num_timesteps)
    drawn = _logit_normal(edges, mean, std) if scheme == "logit_normal" else _mode(edges, scale)
    return np.asarray(drawn[::-1])


def _logit_normal(edges: Array, mean: float, std: float) -> Array:
    """Mass between edges of sigmoid(n), n ~ N(mean, std^2)."""
    with np.errstate(divide="ignore"):
        z = (np.log(edges) - np.log1p(-edges) - mean) / std
    # Above the median, differences of the upper tail: those of numbers near 1 would lose all digits.
    return np.asarray(np.where(z[:-1] > 0, ndtr(-z[:-1]) - ndtr(-z[1:]), ndtr(z[1:]) - ndtr(z[:-1])))


def _mode(edges: Array, scale: float) -> Array:
    """Mass between edges of u(v) = 1 - v - s (cos^2(pi v / 2) - 1 + v), v uniform, which falls from 1 to 0."""
    if not MODE_SCALES[0] <= scale <= MODE_SCALES[1]:
        least, most = MODE_SCALES
        raise UserError(f"model.mode_scale: {scale:g}; from {least:g} to {most:.4f} the density is one")
    low, high = np.zeros_like(edges), np.ones_like(edges)
    for _ in range(60):
        v = (low + high) / 2
        above = 1 - v - scale * (np.cos(np.pi * v / 2) ** 2 - 1 + v) > edges
        low, high = np.where(above, v, low), np.where(above, high, v)
    v = (low + high) / 2
    v[0], v[-1] = 1.0, 0.0
    return np.asarray(v[:-1] - v[1:])
