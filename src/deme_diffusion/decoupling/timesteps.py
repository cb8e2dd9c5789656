"""Probabilistic sampling of timesteps (Eq. 6)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.rng import uniforms


def draw_timesteps(
    denoiser: Denoiser,
    subset: npt.NDArray[np.int64],
    *,
    global_prob: float,
    seed: int,
    step: int,
    first: int,
    count: int,
) -> npt.NDArray[np.int64]:
    """(count,) timesteps: from the expert's own subset with probability 1 - p, from all of [0, T) with p.

    One coin a sample, keyed by (seed, step, global sample index).
    """
    u, coin = uniforms(seed, "t", step, first, count, each=2).T
    everywhere = np.arange(denoiser.num_train_timesteps)
    return np.where(coin < global_prob, denoiser.timesteps(everywhere, u), denoiser.timesteps(subset, u))
