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
UNBOUNDED = ("snr_plus_one", "truncated_snr")
"""Weightings of timesteps' losses (models/weighting.py) that have no finite value where the SNR is 0, or infinite."""
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


def signal_to_noise(config: Mapping[str, Any], *, where: str = "scheduler") -> Array:
    """(T,) SNR of each t: abar / (1 - abar), of a scheduler_config.json or the like. Raises UserError, saying where."""
    signal = alphas_cumprod(config, where=where)
    return signal / (1 - signal)


def alphas_cumprod(config: Mapping[str, Any], *, where: str = "scheduler") -> Array:
    """(T,) abar_t = prod_{s <= t} (1 - beta_s): the share of the image in x_t's variance. Raises UserError."""
    signal = np.cumprod(1 - _betas(config, where), dtype=np.float64)
    if not config.get("rescale_betas_zero_snr", False):
        return signal
    # Lin et al. 2024, Algorithm 1: shifted so that it ends at 0, scaled so that it begins alike.
    root: Array = np.sqrt(signal)
    shifted: Array = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return shifted * shifted


def check_weighting(weighting: str, snr: Array, prediction_type: str, *, key: str) -> None:
    """Raises UserError where one of `UNBOUNDED` has no finite weight in float32, as a training has them."""
    with np.errstate(divide="ignore", over="ignore"):
        growing = {"epsilon": 1 / snr, "sample": snr}.get(prediction_type, np.ones_like(snr)).astype(np.float32)
    if weighting in UNBOUNDED and not (finite := np.isfinite(growing)).all():
        t = int(np.argmin(finite))
        raise UserError(no_finite_weight(f"{key}={weighting}", t, float(snr[t]), prediction_type))


def no_finite_weight(what: str, t: int, snr: float, prediction_type: str) -> str:
    """What to say of a weighting that is infinite at t."""
    return (
        f"{what} has no finite weight at t={t}, where the SNR is {snr:g} and the model predicts {prediction_type}; "
        "use loss_weighting=min_snr, which has one"
    )


def _betas(config: Mapping[str, Any], where: str) -> Array:
    count, name = int(config.get("num_train_timesteps", 1000)), config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return _trained(config["trained_betas"], count, where)
    if name not in SCHEDULES:
        hint = nearest(str(name), SCHEDULES)
        raise UserError(f"{where}: beta_schedule {name!r} is none of {', '.join(SCHEDULES)}{hint}")
    if name in ("squaredcos_cap_v2", "laplace"):
        bar = _cosine if name == "squaredcos_cap_v2" else _laplace
        return np.array([min(1 - bar((i + 1) / count) / bar(i / count), MAX_BETA) for i in range(count)])
    first, last = _beta(config, "beta_start", 1e-4, where), _beta(config, "beta_end", 0.02, where)
    if name == "sigmoid":
        return (last - first) / (1 + np.exp(-np.linspace(-6, 6, count))) + first
    if name == "scaled_linear":
        return np.square(np.linspace(math.sqrt(first), math.sqrt(last), count))
    return np.linspace(first, last, count)


def _beta(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UserError(f"{where}: {key} is {value!r}; a number above 0 and at most 1 is needed")
    return float(value)


def _trained(given: Any, count: int, where: str) -> Array:
    """Betas as they are listed; the last one is 1 where a schedule with a zero terminal SNR was saved."""
    try:
        betas = np.asarray(given, dtype=np.float64)
    except (ValueError, TypeError):
        raise UserError(f"{where}: trained_betas holds what is no number") from None
    if betas.shape != (count,):
        raise UserError(f"{where}: trained_betas holds {betas.size}, for num_train_timesteps={count}")
    if not (possible := (betas > 0) & (betas <= 1)).all():
        t = int(np.argmin(possible))
        raise UserError(f"{where}: trained_betas holds {betas[t]:g} at t={t}; above 0 and at most 1 is needed")
    return betas


def _cosine(t: float) -> float:
    """abar at t in [0, 1]. Nichol and Dhariwal 2021, Eq. 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    """abar at t in [0, 1] of a Laplace law of log-SNR, as diffusers has it."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))
