"""Stable Diffusion 1.x and 2.x: `UNet2DConditionModel` on latents, conditioned on a CLIP text encoder's states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.models.components import longer, quiet
from deme_diffusion.models.denoiser import Condition, Takes
from deme_diffusion.models.discrete import DiscreteDenoiser, check_prediction, discrete_scheduler
from deme_diffusion.models.latent import LatentDenoiser
from deme_diffusion.weight_files import read_json

FOREIGN = ("class_embed_type", "num_class_embeds", "time_cond_proj_dim", "encoder_hid_dim_type")
"""Conditions of a U-Net that its text-to-image pipeline does not give: classes, distilled guidance, image prompts."""


class StableDiffusion(DiscreteDenoiser, LatentDenoiser):
    """Rombach et al. 2022, with epsilon (1.x, 2.x-base) or v prediction (2.x)."""

    family: ClassVar[str] = "stable_diffusion"
    component: ClassVar[str] = "unet"
    kind: ClassVar[str] = "UNet2DConditionModel"
    pipeline_kind: ClassVar[str] = "StableDiffusionPipeline"
    takes: ClassVar[Takes] = "text"
    parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "tokenizer")
    # A checker that blackens images has no place in a measurement; a folder may be without it.
    pipeline_options: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")),
        "requires_safety_checker": False,
    }

    @classmethod
    def check_config(cls, folder: Path, config: dict[str, Any]) -> None:
        where = part_of(folder, cls.component)
        given, latents = config.get("in_channels", 4), latent_channels(folder)
        if given != latents:
            raise UserError(
                f"{where}: {given} input channels for latents of {latents}: a U-Net for inpainting, editing or "
                f"upscaling; family {cls.family} trains text-to-image models"
            )
        if config.get("out_channels", 4) != given:
            raise UserError(f"{where}: {config['out_channels']} output channels for latents of {latents}")
        if foreign := [key for key in FOREIGN if config.get(key) is not None]:
            raise UserError(f"{where}: {foreign[0]} asks for a condition that no {cls.pipeline_kind} gives")
        if config.get("sample_size") is None:
            raise UserError(f"{where}: config.json has no sample_size; write the size of the latents into it")

    @classmethod
    def scheduler_of(cls, folder: Path) -> Any:
        # What the stock pipeline makes of old configs as well, whatever they say.
        scheduler = discrete_scheduler(folder, cls.family, clip_sample=False, steps_offset=1)
        check_prediction(scheduler)
        return scheduler

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """`encoder_hidden_states` (b, tokens, width)."""
        pipeline = self.pipeline
        with quiet("diffusers", "transformers"):
            states, _ = pipeline.encode_prompt(list(captions), pipeline.text_encoder.device, 1, False)
        return self.in_precision(encoder_hidden_states=states)

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        return cut_by(self.pipeline.tokenizer, captions)

    def placeholder(self, count: int) -> Condition:
        config: Any = self.module.config
        tokens = int(read_json(part_of(self.folder, "text_encoder") / "config.json").get("max_position_embeddings", 77))
        return self.zeros(encoder_hidden_states=(count, tokens, config.cross_attention_dim))

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        prediction: torch.Tensor = module(x_t, t, return_dict=False, **condition)[0]
        return prediction

    @property
    def sample_shape(self) -> tuple[int, ...]:
        config: Any = self.module.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels, height, width)


def latent_channels(folder: Path) -> int:
    """Channels of the latents of a pipeline's autoencoder, by its config; diffusers' default where there is none."""
    file = folder / "vae" / "config.json"
    return int(read_json(file).get("latent_channels", 4)) if file.is_file() else 4


def cut_by(tokenizer: Any, captions: Sequence[str]) -> list[bool]:
    """Of each caption, whether it has more tokens than a CLIP tokenizer keeps."""
    return longer(tokenizer, captions, tokenizer.model_max_length)
