"""Unconditional DDPM: any diffusers pipeline folder with a `UNet2DModel` and a discrete noise schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from deme_diffusion.config import PretrainSettings
from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.models.components import loaded_component, opened_component
from deme_diffusion.models.denoiser import Condition, Noised
from deme_diffusion.models.discrete import DiscreteDenoiser, check_prediction, discrete_scheduler
from deme_diffusion.rng import seed_of

KIND = "UNet2DModel"


class DDPM(DiscreteDenoiser):
    """`UNet2DModel` with epsilon, v or sample prediction (Ho et al. 2020; Salimans and Ho 2022)."""

    component: ClassVar[str] = "unet"

    def __init__(self, module: nn.Module, scheduler: Any) -> None:
        self.module, self.scheduler = module, scheduler
        config: Any = module.config
        check_prediction(scheduler)
        if config.out_channels != config.in_channels:
            raise UserError(
                f"unet: {config.out_channels} output channels for {config.in_channels} input channels; "
                "models that also learn the variance are not supported"
            )
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            raise UserError("unet: it asks for class labels; class-conditional models are not supported")

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None) -> Self:
        module = opened_component(folder, cls.component, KIND, "ddpm", dtype)
        return cls(module, discrete_scheduler(folder, "ddpm"))

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
        return loaded_component(part_of(folder, self.component), KIND).eval()

    def noised(self, batch: dict[str, Any], t: torch.Tensor, noise: torch.Tensor) -> Noised:
        return self.diffused(batch["image"], {}, t, noise)

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        prediction: torch.Tensor = module(x_t, t, return_dict=False, **condition)[0]
        return prediction

    @property
    def sample_shape(self) -> tuple[int, ...]:
        config: Any = self.module.config
        size = config.sample_size
        if size is None:
            raise UserError("unet: config.json has no sample_size; write the size of the images that it was trained on")
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels, height, width)
