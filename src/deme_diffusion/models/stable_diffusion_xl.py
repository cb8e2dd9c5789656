"""Stable Diffusion XL: two text encoders, a pooled embedding, and the sizes that an image was trained at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.models.components import quiet
from deme_diffusion.models.denoiser import Condition, Prompt
from deme_diffusion.models.discrete import check_prediction, discrete_scheduler
from deme_diffusion.models.stable_diffusion import StableDiffusion, cut_by
from deme_diffusion.weight_files import read_json

ADDED = ("text_embeds", "time_ids")
"""What the U-Net takes as `added_cond_kwargs`."""


class StableDiffusionXL(StableDiffusion):
    """Podell et al. 2023: the base model; the refiner is another one."""

    family: ClassVar[str] = "stable_diffusion_xl"
    pipeline_kind: ClassVar[str] = "StableDiffusionXLPipeline"
    parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline_options: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None,
                                                  "add_watermarker": False}  # fmt: skip

    @classmethod
    def check_config(cls, folder: Path, config: dict[str, Any]) -> None:
        super().check_config(folder, config)
        each, total = config.get("addition_time_embed_dim"), config.get("projection_class_embeddings_input_dim")
        second = folder / "text_encoder_2" / "config.json"
        pooled = read_json(second).get("projection_dim", 512) if second.is_file() else None
        if each is None or total is None or (pooled is not None and total != 6 * each + pooled):
            where = part_of(folder, cls.component)
            raise UserError(
                f"{where}: does not take a pooled embedding and six sizes (the SDXL refiner takes five); family "
                f"{cls.family} trains SDXL's base model"
            )

    @classmethod
    def scheduler_of(cls, folder: Path) -> Any:
        scheduler = discrete_scheduler(folder, cls.family, unclipped=True)
        check_prediction(scheduler)
        return scheduler

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """`encoder_hidden_states` (b, tokens, both widths), `text_embeds` (b, width), `time_ids` (b, 6).

        '' is what the stock pipeline guides away from: zeros where its config forces them, as SDXL's does.
        """
        pipeline = self.pipeline
        with quiet("diffusers", "transformers"):
            device = pipeline.text_encoder_2.device
            states, _, pooled, _ = pipeline.encode_prompt(list(captions), None, device, 1, False)
        if pipeline.config.force_zeros_for_empty_prompt:
            for i in (i for i, caption in enumerate(captions) if not caption):
                states[i], pooled[i] = 0, 0
        ids = self.time_ids(len(captions)).to(device)
        return self.in_precision(encoder_hidden_states=states, text_embeds=pooled, time_ids=ids)

    def normalised(self, latents: torch.Tensor) -> torch.Tensor:
        """By mean and deviation as well, where the autoencoder's config states them: what the pipeline undoes."""
        config = self.pipeline.vae.config
        if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
            return super().normalised(latents)
        mean, std = (latents.new_tensor(said).view(1, -1, 1, 1) for said in (config.latents_mean, config.latents_std))
        scale: float = config.scaling_factor
        return (latents - mean) * scale / std

    def time_ids(self, count: int) -> torch.Tensor:
        """Original size, crop's corner and target size (count, 6): whole images at the training resolution.

        An image's own size, before `data.resolution`, is not told: the original is called as large as the target.
        """
        _, height, width = self.image_shape
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(count, 1)

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        tokenizers = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        return [any(cut) for cut in zip(*(cut_by(tokenizer, captions) for tokenizer in tokenizers), strict=True)]

    def placeholder(self, count: int) -> Condition:
        config: Any = self.module.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found = {**super().placeholder(count), **self.zeros(text_embeds=(count, pooled))}
        return {**found, "time_ids": self.time_ids(count).to(found["text_embeds"])}

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        added = {key: condition[key] for key in ADDED}
        states = condition["encoder_hidden_states"]
        options = {"encoder_hidden_states": states, "added_cond_kwargs": added, "return_dict": False}
        prediction: torch.Tensor = module(x_t, t, **options)[0]
        return prediction

    def asked(self, prompts: Sequence[Prompt], guidance_scale: float | None) -> dict[str, Any]:
        _, height, width = self.image_shape  # a rectangle as well, which the pipeline does not take from the config
        return {**super().asked(prompts, guidance_scale), "height": height, "width": width}
