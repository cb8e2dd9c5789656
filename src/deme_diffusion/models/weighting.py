"""Weights of each timestep's loss: published ones, in the units of what the model predicts.

A weight w on || x0 error ||^2 is w / SNR on || epsilon error ||^2 and w / (SNR + 1) on || v error ||^2, since the
epsilon error is sqrt(SNR) times, and the v error sqrt(SNR + 1) times, the x0 error; of a flow, with sigma =
1 / (1 + sqrt(SNR)), the error of eps - x0 is 1 / sigma times it. Each function is written so that its limits at an SNR
of 0 and of infinity come out where they are finite.
"""

from __future__ import annotations

import torch

from deme_diffusion.config import TrainSettings
from deme_diffusion.errors import UserError
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.schedule import FLOW_PREDICTION, no_finite_weight

MIN_SNR_GAMMA = 5.0
"""Where `snr_gamma` is not said (Hang et al. 2023)."""


def flow_per_x0(snr: torch.Tensor) -> torch.Tensor:
    """sigma^2 = 1 / (1 + sqrt(SNR))^2: what a weight on the x0 error is on that of eps - x0."""
    return (1 + snr.sqrt()) ** -2


def snr_plus_one_weights(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """SNR + 1 on the x0 error, which is 1 on the v error: (T,) -> (T,). Salimans and Ho 2022, Sec. 4."""
    return {
        "epsilon": 1 + 1 / snr,
        "v_prediction": torch.ones_like(snr),
        "sample": snr + 1,
        FLOW_PREDICTION: (snr + 1) * flow_per_x0(snr),
    }[prediction_type]


def truncated_snr_weights(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """max(SNR, 1) on the x0 error: (T,) -> (T,). Salimans and Ho 2022, Sec. 4."""
    return {
        "epsilon": (1 / snr).clamp(min=1),
        "v_prediction": torch.maximum(1 / (1 + 1 / snr), 1 / (1 + snr)),
        "sample": snr.clamp(min=1),
        FLOW_PREDICTION: snr.clamp(min=1) * flow_per_x0(snr),
    }[prediction_type]


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """min(SNR, gamma) on the x0 error: (T,) -> (T,). Hang et al. 2023, Sec. 3.4."""
    clipped = snr.clamp(max=gamma)
    divisor = {
        "epsilon": snr,
        "v_prediction": snr + 1,
        "sample": torch.ones_like(snr),
        FLOW_PREDICTION: 1 / flow_per_x0(snr),
    }[prediction_type]
    # With a zero terminal SNR the epsilon weight is 0/0; its limit is 1.
    return torch.where(divisor > 0, clipped / divisor, torch.ones_like(snr))


def p2_weights(snr: torch.Tensor, gamma: float, k: float, prediction_type: str) -> torch.Tensor:
    """1 / (k + SNR)^gamma on the epsilon error: (T,) -> (T,). Choi et al. 2022."""
    on_epsilon = (k + snr) ** -gamma
    return {
        "epsilon": on_epsilon,
        "v_prediction": on_epsilon / (1 + 1 / snr),  # SNR / (SNR + 1) of it
        "sample": (k + snr) ** (1 - gamma) / (1 + k / snr),  # SNR times it
        FLOW_PREDICTION: on_epsilon * snr * flow_per_x0(snr),  # (1 - sigma)^2 of it
    }[prediction_type]


def timestep_weights(settings: TrainSettings, denoiser: Denoiser) -> torch.Tensor | None:
    """The weight of each timestep's loss (T,), in float64 on the CPU; None where all are 1.

    Raises UserError where the schedule makes one infinite: what it predicts there says nothing about the loss.
    """
    snr, predicts, weighting = denoiser.snr(), denoiser.prediction_type, settings.loss_weighting
    if weighting == "min_snr" or settings.snr_gamma is not None:
        weights = min_snr_weights(snr, settings.snr_gamma or MIN_SNR_GAMMA, predicts)
    elif weighting == "snr_plus_one":
        weights = snr_plus_one_weights(snr, predicts)
    elif weighting == "truncated_snr":
        weights = truncated_snr_weights(snr, predicts)
    elif weighting == "p2":
        weights = p2_weights(snr, settings.p2_gamma, settings.p2_k, predicts)
    else:
        return None
    if not bool((finite := weights.float().isfinite()).all()):  # a training has them in float32
        t = int((~finite).nonzero()[0])
        raise UserError(no_finite_weight(f"loss_weighting={weighting}", t, float(snr[t]), predicts))
    return weights
