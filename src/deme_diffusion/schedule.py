"""The noise schedule of a scheduler's configuration, as diffusers' `DDPMScheduler` makes it, in float64. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.errors import UserError, nearest

Array = npt.NDArray[np.float64]
MAX_BETA = 0.999
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


def signal_to_noise(config: Mapping[str, Any]) -> Array:
    """(T,) SNR of each t: abar / (1 - abar), of a scheduler_config.json or the like. Raises UserError."""
    signal = alphas_cumprod(config)
    return signal / (1 - signal)


def alphas_cumprod(config: Mapping[str, Any]) -> Array:
    """(T,) abar_t = prod_{s <= t} (1 - beta_s): the share of the image in x_t's variance. Raises UserError."""
    signal = np.cumprod(1 - _betas(config), dtype=np.float64)
    if not config.get("rescale_betas_zero_snr", False):
        return signal
    root: Array = np.sqrt(
        signal
    )  # Lin et al. 2024, Algorithm 1: shifted so that it ends at 0, scaled so that it begins alike
    shifted: Array = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return shifted * shifted


def _betas(config: Mapping[str, Any]) -> Array:
    count, name = int(config.get("num_train_timesteps", 1000)), config.get("beta_schedule", "linear")
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
    elif name == "linear":
        betas = np.linspace(first, last, count)
    elif name == "scaled_linear":
        betas = np.square(np.linspace(math.sqrt(first), math.sqrt(last), count))
    elif name == "sigmoid":
        betas = (last - first) / (1 + np.exp(-np.linspace(-6, 6, count))) + first
    elif name in SCHEDULES:
        bar = _cosine if name == "squaredcos_cap_v2" else _laplace
        betas = np.array([min(1 - bar((i + 1) / count) / bar(i / count), MAX_BETA) for i in range(count)])
    else:
        hint = nearest(str(name), SCHEDULES)
        raise UserError(f"scheduler: beta_schedule {name!r} is none of {', '.join(SCHEDULES)}{hint}")
    if betas.shape != (count,) or not ((betas > 0) & (betas < 1)).all():
        raise UserError(f"scheduler: its betas are {betas.shape}; {count} between 0 and 1 are needed")
    return betas


def _cosine(t: float) -> float:
    """abar at t in [0, 1]. Nichol and Dhariwal 2021, Eq. 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    """abar at t in [0, 1] of a Laplace law of log-SNR, as diffusers has it."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))
