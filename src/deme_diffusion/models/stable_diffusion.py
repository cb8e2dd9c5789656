"""Stable Diffusion 1.x and 2.x: `UNet2DConditionModel` on latents, conditioned on a CLIP text encoder's states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from deme_diffusion.files import part_of
from deme_diffusion.models.denoiser import Condition, Takes
from deme_diffusion.models.discrete import DiscreteDenoiser, check_prediction, discrete_scheduler
from deme_diffusion.models.latent import LatentDenoiser
from deme_diffusion.weight_files import read_json


class StableDiffusion(DiscreteDenoiser, LatentDenoiser):
    """Rombach et al. 2022, with epsilon (1.x, 2.x-base) or v prediction (2.x)."""

    family: ClassVar[str] = "stable_diffusion"
    component: ClassVar[str] = "unet"
    kind: ClassVar[str] = "UNet2DConditionModel"
    pipeline_kind: ClassVar[str] = "StableDiffusionPipeline"
    takes: ClassVar[Takes] = "text"

    @classmethod
    def scheduler_of(cls, folder: Path) -> Any:
        scheduler = discrete_scheduler(folder, cls.family)
        check_prediction(scheduler)
        return scheduler

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """`encoder_hidden_states` (b, tokens, width)."""
        pipeline = self.pipeline
        device = next(pipeline.text_encoder.parameters()).device
        states, _ = pipeline.encode_prompt(list(captions), device, 1, False)
        return {"encoder_hidden_states": states.to(next(self.module.parameters()).dtype)}

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        tokenizer = self.pipeline.tokenizer
        return [len(tokenizer(caption).input_ids) > tokenizer.model_max_length for caption in captions]

    def placeholder(self, count: int) -> Condition:
        config: Any = self.module.config
        tokens = int(read_json(part_of(self.folder, "text_encoder") / "config.json")["max_position_embeddings"])
        first = next(self.module.parameters())
        shape = (count, tokens, config.cross_attention_dim)
        return {"encoder_hidden_states": torch.zeros(shape, dtype=first.dtype, device=first.device)}

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        prediction: torch.Tensor = module(x_t, t, return_dict=False, **condition)[0]
        return prediction

    @property
    def sample_shape(self) -> tuple[int, ...]:
        config: Any = self.module.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels, height, width)
