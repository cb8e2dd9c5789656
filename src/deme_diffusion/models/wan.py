"""Wan text-to-video: `WanTransformer3DModel` on latents of videos, of which an image is one of a single frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.models.components import quiet
from deme_diffusion.models.denoiser import Condition, Prompt
from deme_diffusion.models.flow import FlowDenoiser
from deme_diffusion.weight_files import read_json

OWN_PIXELS = (480, 832)
"""What the stock pipeline samples where it is not told otherwise; no config says a size."""


class Wan(FlowDenoiser):
    """Wan Team 2025, of one transformer. Samples are latents (c, f, h, w), of `model.num_frames` frames."""

    family: ClassVar[str] = "wan"
    kind: ClassVar[str] = "WanTransformer3DModel"
    pipeline_kind: ClassVar[str] = "WanPipeline"
    parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "tokenizer")
    text_tokens: ClassVar[int] = 512

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None) -> Self:
        index = read_json(folder / "model_index.json")
        if index.get("boundary_ratio") is not None:
            raise UserError(
                f"{folder}: a pair of experts, transformer and transformer_2; name a base of one transformer, or merge "
                "the pair into one: deme merge --base BASE --pair PAIR --out DIR"
            )
        return super().load(folder, dtype)

    @classmethod
    def channels_in(cls, folder: Path) -> int | None:
        latents = read_json(part_of(folder, cls.autoencoder) / "config.json").get("z_dim")
        return None if latents is None else int(latents)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """`encoder_hidden_states` (b, tokens, width) of UMT5."""
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.max_sequence_length}
        pipeline = self.pipeline
        with quiet("diffusers", "transformers"):
            states, _ = pipeline.encode_prompt(list(captions), device=pipeline.text_encoder.device, **options)
        return self.in_precision(encoder_hidden_states=states)

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        return self.cut_by(self.pipeline.tokenizer, captions)

    def as_encoder_takes(self, images: torch.Tensor) -> torch.Tensor:
        """A video of `model.num_frames` frames that stands still.

        Its latents are not those of one frame repeated: the encoder is causal, and its first latent is of one frame
        alone.
        """
        return images.unsqueeze(2).repeat(1, 1, self.settings.num_frames, 1, 1)

    def normalised(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        mean, std = (
            latents.new_tensor(said).view(1, -1, 1, 1, 1) for said in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std

    def placeholder(self, count: int) -> Condition:
        config: Any = self.module.config
        return self.zeros(
            encoder_hidden_states=(count, self.max_sequence_length, config.text_dim),
        )

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        prediction: torch.Tensor = module(hidden_states=x_t, timestep=self.asked_at(t), return_dict=False, **condition)[
            0
        ]
        return prediction

    # -- sizes -------------------------------------------------------------------------------------

    @property
    def own_pixels(self) -> tuple[int, int]:
        return OWN_PIXELS

    @property
    def downscaling(self) -> int:
        return int(self.vae_config.get("scale_factor_spatial") or 8)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        frames, each = self.settings.num_frames, int(self.vae_config.get("scale_factor_temporal") or 4)
        if (frames - 1) % each:
            near = (frames - 1) // each * each + 1
            raise UserError(f"model.num_frames: {frames}; 1 and a multiple of {each} is needed, such as {near}")
        channels, height, width = super().sample_shape
        return (channels, (frames - 1) // each + 1, height, width)

    @property
    def image_shape(self) -> tuple[int, ...]:
        config = self.vae_config
        return (int(config.get("in_channels", 3)) // int(config.get("patch_size") or 1) ** 2, *self.pixels)

    # -- sampling ----------------------------------------------------------------------------------

    def asked(self, prompts: Sequence[Prompt], guidance_scale: float | None) -> dict[str, Any]:
        return {**super().asked(prompts, guidance_scale), "num_frames": self.settings.num_frames}

    def as_images(self, images: Any) -> torch.Tensor:
        """The first frame of each video."""
        first: torch.Tensor = images[:, 0]
        return first
