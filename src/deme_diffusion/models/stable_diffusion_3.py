"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel` on latents, conditioned on two CLIP encoders and T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from deme_diffusion.files import part_of
from deme_diffusion.models.components import longer, quiet
from deme_diffusion.models.denoiser import Condition
from deme_diffusion.models.flow import FlowDenoiser
from deme_diffusion.weight_files import read_json


class StableDiffusion3(FlowDenoiser):
    """Esser et al. 2024; the part of T5 may be missing from a checkpoint, as in the stock pipeline.

    Of diffusers' training script it has the density of t, not the loss: by default (precondition_outputs=1) that one is
    of x_0, which is sigma^2 times this one, of the velocity.
    """

    family: ClassVar[str] = "stable_diffusion_3"
    kind: ClassVar[str] = "SD3Transformer2DModel"
    pipeline_kind: ClassVar[str] = "StableDiffusion3Pipeline"
    scheme: ClassVar[Literal["uniform", "logit_normal"]] = "logit_normal"
    parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline_options: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    text_tokens: ClassVar[int] = 256

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """`encoder_hidden_states` (b, tokens, width): CLIP's, then T5's; `pooled_projections` (b, width) of CLIP."""
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.max_sequence_length}
        pipeline = self.pipeline
        with quiet("diffusers", "transformers"):
            states, _, pooled, _ = pipeline.encode_prompt(
                list(captions), None, None, device=pipeline.text_encoder.device, **options
            )
        return self.in_precision(encoder_hidden_states=states, pooled_projections=pooled)

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        pipeline, most = self.pipeline, self.pipeline.tokenizer_max_length
        cuts = [longer(tokenizer, captions, most) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)]
        if pipeline.text_encoder_3 is not None:
            cuts.append(self.cut_by(pipeline.tokenizer_3, captions))
        return [any(cut) for cut in zip(*cuts, strict=True)]

    def placeholder(self, count: int) -> Condition:
        config: Any = self.module.config
        clip = int(read_json(part_of(self.folder, "text_encoder") / "config.json")["max_position_embeddings"])
        return self.zeros(
            encoder_hidden_states=(count, clip + self.max_sequence_length, config.joint_attention_dim),
            pooled_projections=(count, config.pooled_projection_dim),
        )

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        prediction: torch.Tensor = module(hidden_states=x_t, timestep=self.asked_at(t), return_dict=False, **condition)[
            0
        ]
        return prediction

    @property
    def own_pixels(self) -> tuple[int, int]:
        config: Any = self.module.config
        side = config.sample_size * self.downscaling
        return side, side
