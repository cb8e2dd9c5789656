"""What families on a discrete schedule of betas share: forward process, targets, the index of a timestep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.files import part_of
from deme_diffusion.models.components import quiet
from deme_diffusion.models.denoiser import Condition, Denoiser, Noised

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class DiscreteDenoiser(Denoiser):
    """Epsilon, v or sample prediction on T discrete timesteps (Ho et al. 2020; Salimans and Ho 2022)."""

    def diffused(self, clean: torch.Tensor, condition: Condition, t: torch.Tensor, noise: torch.Tensor) -> Noised:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, and the target by the scheduler's prediction type."""
        x_t = self.scheduler.add_noise(clean, noise, t)
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(clean, noise, t)
        else:
            target = clean
        return Noised(x_t, t, target, condition)

    def index(self, timestep: torch.Tensor) -> torch.Tensor:
        # Some samplers ask at fractions, or at t = T: a fraction belongs to the step below, T to the last one.
        return timestep.long().clamp(0, self.num_train_timesteps - 1)

    def snr(self) -> torch.Tensor:
        alphas: torch.Tensor = self.scheduler.alphas_cumprod.double()
        return alphas / (1 - alphas)


def discrete_scheduler(folder: Path, family: str, *, unclipped: bool = False, **options: Any) -> Any:
    """A pipeline's noise schedule as the training process. Raises UserError where it is none of betas.

    Any discrete scheduler's config carries the betas and the prediction type; DDPM is the training process. `options`
    override the config; `unclipped`: where it says nothing, samplers do not clip x_0, which is meant for pixels.
    """
    from diffusers import DDPMScheduler

    with quiet("diffusers"):
        given = DDPMScheduler.load_config(part_of(folder, "scheduler"))
        options |= {"clip_sample": False} if unclipped and "clip_sample" not in given else {}
        scheduler: Any = DDPMScheduler.from_pretrained(part_of(folder, "scheduler"), **options)
    known = [compatible.__name__ for compatible in scheduler.compatibles]
    if given.get("_class_name") not in known and "beta_schedule" not in given:
        raise UserError(
            f"{folder}: a {given.get('_class_name')} has no discrete schedule of betas, which family {family} needs"
        )
    return scheduler


def check_prediction(scheduler: Any) -> None:
    """Raises UserError for a prediction type that is none of the three."""
    if scheduler.config.prediction_type not in PREDICTIONS:
        raise UserError(
            f"scheduler: prediction_type {scheduler.config.prediction_type!r} is none of {', '.join(PREDICTIONS)}"
            f"{nearest(scheduler.config.prediction_type, PREDICTIONS)}"
        )
