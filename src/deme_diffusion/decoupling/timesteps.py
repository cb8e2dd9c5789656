"""Probabilistic sampling of timesteps (Eq. 6): by sample, or by batch and in mirrored pairs as in the public script."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.rng import uniforms

Timesteps = npt.NDArray[np.int64]
Uniforms = npt.NDArray[np.float64]


def draw_timesteps(
    denoiser: Denoiser,
    subset: Timesteps,
    *,
    global_prob: float,
    seed: int,
    step: int,
    first: int,
    count: int,
    batch: int | None = None,
    antithetic: bool = False,
) -> Timesteps:
    """(count,) timesteps: from the expert's own subset with probability 1 - p, from all of [0, T) with p.

    One coin a sample, keyed by (seed, step, global sample index); or with `batch`, the samples of a micro-batch over
    all processes, one coin for each of those. `antithetic`: the global samples 2k and 2k+1 are a pair, at u and 1 - u
    of the distribution of t; where that is uniform on [lo, hi), at t and lo + hi - 1 - t. A sample's timestep never
    depends on how many processes there are.
    """
    everywhere = np.arange(denoiser.num_train_timesteps)
    u, coin = (_pairwise if antithetic else _each)(seed, step, first, count)
    if batch is not None:
        coin = _coins_of_batches(seed, step, first, count, batch)
    if antithetic:
        second = np.arange(first, first + count) % 2 == 1
        u = np.where(second, np.nextafter(1 - u, 0), u)
    return np.where(coin < global_prob, denoiser.timesteps(everywhere, u), denoiser.timesteps(subset, u))


def _each(seed: int, step: int, first: int, count: int) -> tuple[Uniforms, Uniforms]:
    u, coin = uniforms(seed, "t", step, first, count, each=2).T
    return u, coin


def _pairwise(seed: int, step: int, first: int, count: int) -> tuple[Uniforms, Uniforms]:
    """Both samples of a pair get its number and its coin, whatever batch they fall into."""
    pairs = np.arange(first, first + count) // 2
    drawn = uniforms(seed, "t of a pair", step, int(pairs[0]), int(pairs[-1] - pairs[0]) + 1, each=2)
    u, coin = drawn[pairs - pairs[0]].T
    return u, coin


def _coins_of_batches(seed: int, step: int, first: int, count: int, batch: int) -> Uniforms:
    """The coin of the micro-batch that each sample belongs to."""
    owner = np.arange(first, first + count) // batch
    drawn = uniforms(seed, "coin of a batch", step, int(owner[0]), int(owner[-1] - owner[0]) + 1)
    return np.asarray(drawn[owner - owner[0], 0])
