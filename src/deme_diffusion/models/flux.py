"""Flux, dev and schnell: `FluxTransformer2DModel` on packed latents, conditioned on T5 and a pooled CLIP embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from deme_diffusion.config import ModelSettings
from deme_diffusion.errors import UserError
from deme_diffusion.models.components import quiet
from deme_diffusion.models.denoiser import Condition
from deme_diffusion.models.flow import FlowDenoiser


class Flux(FlowDenoiser):
    """Black Forest Labs 2024. Samples are latents (c, h, w); a forward gets them as tokens of 2 x 2 latents."""

    family: ClassVar[str] = "flux"
    kind: ClassVar[str] = "FluxTransformer2DModel"
    pipeline_kind: ClassVar[str] = "FluxPipeline"
    parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline_options: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    timestep_scale: ClassVar[float] = 1e-3
    text_tokens: ClassVar[int] = 512

    @classmethod
    def channels_in(cls, folder: Path) -> int | None:
        latents = super().channels_in(folder)
        return None if latents is None else 4 * latents

    def configure(self, settings: ModelSettings) -> None:
        config: Any = self.module.config
        if "training_guidance" in settings.changed() and not config.guidance_embeds:
            raise UserError(f"model.training_guidance: {self.folder} is told no guidance; leave it out")
        super().configure(settings)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """`encoder_hidden_states` (b, tokens, width) of T5; `pooled_projections` (b, width) of CLIP."""
        pipeline = self.pipeline
        with quiet("diffusers", "transformers"):
            states, pooled, _ = pipeline.encode_prompt(
                list(captions), device=pipeline.text_encoder.device, max_sequence_length=self.max_sequence_length
            )
        return self.in_precision(encoder_hidden_states=states, pooled_projections=pooled)

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        return self.cut_by(self.pipeline.tokenizer_2, captions)

    def placeholder(self, count: int) -> Condition:
        config: Any = self.module.config
        return self.zeros(
            encoder_hidden_states=(count, self.max_sequence_length, config.joint_attention_dim),
            pooled_projections=(count, config.pooled_projection_dim),
        )

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        config: Any = self.module.config
        height, width = x_t.shape[-2:]
        guidance = self._told(x_t) if config.guidance_embeds else None
        tokens = module(
            hidden_states=packed(x_t),
            timestep=self.asked_at(t),
            guidance=guidance,
            txt_ids=x_t.new_zeros(condition["encoder_hidden_states"].shape[1], 3),
            img_ids=positions(height // 2, width // 2).to(x_t),
            return_dict=False,
            **condition,
        )[0]
        return unpacked(tokens, height, width)

    def _told(self, x_t: torch.Tensor) -> torch.Tensor:
        """`model.training_guidance` (b,): what a guidance-distilled model is told beside the caption."""
        return torch.full((len(x_t),), self.settings.training_guidance, device=x_t.device)

    @property
    def latent_channels(self) -> int:
        config: Any = self.module.config
        return int(config.in_channels) // 4

    @property
    def own_pixels(self) -> tuple[int, int]:
        side = int(self.vae_config["sample_size"])
        return side, side


def packed(latents: torch.Tensor) -> torch.Tensor:
    """(b, c, h, w) -> (b, h/2 * w/2, 4 c): each 2 x 2 of them is a token."""
    tokens = nn.functional.pixel_unshuffle(latents, 2)
    return tokens.flatten(2).transpose(1, 2)


def unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `packed`, to (b, c, height, width)."""
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, height // 2, width // 2)
    return nn.functional.pixel_shuffle(grid, 2)


def positions(height: int, width: int) -> torch.Tensor:
    """(height * width, 3): of each token 0, its row, its column."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
