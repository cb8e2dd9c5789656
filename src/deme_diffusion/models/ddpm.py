"""Unconditional DDPM: any diffusers pipeline folder with a `UNet2DModel` and a discrete noise schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from deme_diffusion.config import PretrainSettings
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.files import part_of
from deme_diffusion.models.denoiser import Condition, Denoiser, Noised
from deme_diffusion.rng import seed_of
from deme_diffusion.weights import Weights, check_component

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class DDPM(Denoiser):
    """`UNet2DModel` with epsilon, v or sample prediction (Ho et al. 2020; Salimans and Ho 2022)."""

    component: ClassVar[str] = "unet"

    def __init__(self, module: nn.Module, scheduler: Any) -> None:
        self.module, self.scheduler = module, scheduler
        config: Any = module.config
        if scheduler.config.prediction_type not in PREDICTIONS:
            raise UserError(
                f"scheduler: prediction_type {scheduler.config.prediction_type!r} is none of {', '.join(PREDICTIONS)}"
                f"{nearest(scheduler.config.prediction_type, PREDICTIONS)}"
            )
        if config.out_channels != config.in_channels:
            raise UserError(
                f"unet: {config.out_channels} output channels for {config.in_channels} input channels; "
                "models that also learn the variance are not supported"
            )
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            raise UserError("unet: it asks for class labels; class-conditional models are not supported")

    @classmethod
    def load(cls, folder: Path) -> Self:
        from diffusers import DDPMScheduler

        component = part_of(folder, cls.component)
        check_component(component)
        kind = json.loads((component / "config.json").read_text()).get("_class_name")
        if kind != "UNet2DModel":
            raise UserError(f"{component}: a {kind}, but family ddpm needs a UNet2DModel")
        module = _unet(component)
        # Any discrete scheduler's config carries the betas and the prediction type; DDPM is the training process.
        scheduler: Any = DDPMScheduler.from_pretrained(part_of(folder, "scheduler"))
        given = DDPMScheduler.load_config(part_of(folder, "scheduler"))
        known = [compatible.__name__ for compatible in scheduler.compatibles]
        if given.get("_class_name") not in known and "beta_schedule" not in given:
            raise UserError(
                f"{folder}: a {given.get('_class_name')} has no discrete schedule of betas, which family ddpm needs"
            )
        return cls(module, scheduler)

    @classmethod
    def from_scratch(cls, settings: PretrainSettings, *, out_seed: int) -> Self:
        """A freshly initialised model of `pretrain.unet` and `pretrain.scheduler`; weights keyed by the seed."""
        from diffusers import DDPMScheduler, UNet2DModel

        options = settings.unet.model_dump()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(out_seed, "init"))
            module = UNet2DModel(out_channels=options["in_channels"], **options)
        return cls(module, DDPMScheduler(**settings.scheduler.model_dump()))

    def component_from(self, folder: Path) -> nn.Module:
        return _unet(part_of(folder, self.component)).eval()

    def noised(self, batch: dict[str, Any], t: torch.Tensor, noise: torch.Tensor) -> Noised:
        clean = batch["image"]
        x_t = self.scheduler.add_noise(clean, noise, t)
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(clean, noise, t)
        else:
            target = clean
        return Noised(x_t, t, target, {})

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        prediction: torch.Tensor = module(x_t, t, return_dict=False, **condition)[0]
        return prediction

    def index(self, timestep: torch.Tensor) -> torch.Tensor:
        # Some samplers ask at fractions, or at t = T: a fraction belongs to the step below, T to the last one.
        return timestep.long().clamp(0, self.num_train_timesteps - 1)

    def snr(self) -> torch.Tensor:
        alphas: torch.Tensor = self.scheduler.alphas_cumprod.double()
        return alphas / (1 - alphas)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        config: Any = self.module.config
        size = config.sample_size
        if size is None:
            raise UserError("unet: config.json has no sample_size; write the size of the images that it was trained on")
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels, height, width)


def _unet(folder: Path) -> nn.Module:
    from diffusers import UNet2DModel

    with Weights(folder):  # opening them tells a truncated, missing or pickled file in one line
        pass
    module: nn.Module
    try:
        module, found = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False, output_loading_info=True)
    except RuntimeError as error:  # shapes
        raise UserError(f"{folder}: weights do not fit config.json: {' '.join(str(error).split())}") from None
    # diffusers only warns of missing keys, and leaves them at random values.
    wrong = [f"{len(keys)} {what.replace('_', ' ')} ({sorted(keys)[0]}, ...)" for what, keys in found.items() if keys]
    if wrong:
        raise UserError(f"{folder}: weights do not fit config.json: {', '.join(wrong)}")
    return module
