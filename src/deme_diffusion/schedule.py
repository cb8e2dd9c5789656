"""The noise schedule of a scheduler's configuration, in float64: of betas, or a flow's sigmas. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.errors import UserError, nearest

Array = npt.NDArray[np.float64]
MAX_BETA = 0.999
UNBOUNDED = ("snr_plus_one", "truncated_snr")
"""Weightings of timesteps' losses (models/weighting.py) that have no finite value where the SNR is 0, or infinite."""
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
EDGE_SLACK = 0.05
"""Share of the gap to the sigma below by which a timestep may miss its own."""
FLOW_PREDICTION = "flow_prediction"
"""Flow matching: what a model predicts is eps - x_0, as diffusers' solvers name it."""


def signal_to_noise(config: Mapping[str, Any], *, where: str = "scheduler") -> Array:
    """(T,) SNR of each t: abar / (1 - abar), of a scheduler_config.json or the like. Raises UserError, saying where.

    Of a flow it is (1 - sigma)^2 / sigma^2.
    """
    if is_flow(config):
        sigmas = flow_sigmas(config, where=where)
        return np.square((1 - sigmas) / sigmas)
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


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is of flow matching: by its class, or by flow sigmas of a general solver.

    That of a scheduler made in code names no class; a flow's then has a shift and no betas.
    """
    if config.get("use_flow_sigmas", False):
        return True
    name = config.get("_class_name")
    return "shift" in config and "beta_schedule" not in config if name is None else str(name).startswith("FlowMatch")


def prediction_of(config: Mapping[str, Any]) -> str:
    """What a model on that schedule predicts: `epsilon` where the configuration does not say."""
    return FLOW_PREDICTION if is_flow(config) else str(config.get("prediction_type", "epsilon"))


def flow_sigmas(config: Mapping[str, Any], *, where: str = "scheduler") -> Array:
    """(T,) ascending sigmas of x_t = (1 - sigma) x_0 + sigma eps: s u / (1 + (s - 1) u) at u = (i + 1) / T, shift s.

    As diffusers' flow-matching schedulers hold them for training, the other way round; those that shift by the size of
    images do so only when they sample. Esser et al. 2024, Eq. 23. Raises UserError, saying where.
    """
    if config.get("invert_sigmas", False):
        raise UserError(f"{where}: invert_sigmas=true, where noise and image change places, is not supported")
    count, shift = int(config.get("num_train_timesteps", 1000)), flow_shift(config, where=where)
    u = np.arange(1, count + 1) / count
    return np.asarray(shift * u / (1 + (shift - 1) * u), dtype=np.float64)


def flow_shift(config: Mapping[str, Any], *, where: str = "scheduler") -> float:
    """The shift of a flow's sigmas; 1 where they are shifted by the image's size instead. Raises UserError."""
    if config.get("use_dynamic_shifting", False):
        return 1.0
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise UserError(f"{where}: the shift is {shift!r}; a number above 0 is needed")
    return float(shift)


def flow_edges(sigmas: Array) -> Array:
    """(T,) ascending values of T sigma from which on a timestep has index i, the first one 0.

    A little below T sigma_i, so that the rounding of a scheduler or a pipeline moves no step to its neighbour; and
    numbers of float32, in which diffusers compares timesteps with a boundary.
    """
    gaps = np.diff(sigmas, prepend=0.0)
    edges = ((sigmas - EDGE_SLACK * gaps) * len(sigmas)).astype(np.float32).astype(np.float64)
    edges[0] = 0.0
    return edges


def in_sigma(sigmas: Array, runs: Sequence[Sequence[int]]) -> str:
    """Runs [low, high) of timesteps by their sigmas, each from its first one's to the next one's: `[0, 0.43)`.

    Over all timesteps that is [0, 1], once.
    """
    edges = [0.0, *sigmas[1:], 1.0]
    return "+".join(f"[{edges[low]:.4g}, {edges[high]:.4g}{')' if high < len(sigmas) else ']'}" for low, high in runs)


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
