"""Models that denoise the latents of an autoencoder: encoding of images and captions, sampling by the stock pipeline.

The pipeline's other parts (autoencoder, text encoders, tokenizers) are loaded when something is to be encoded or
sampled, and not before: a training on a cache of latents and embeddings never touches them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from deme_diffusion.config import ModelSettings
from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.models.components import loaded_component, opened_component
from deme_diffusion.models.denoiser import Condition, Denoiser, Noised, Prompt
from deme_diffusion.weight_files import read_json


class LatentDenoiser(Denoiser):
    """A component of the stock pipeline `pipeline_kind` in `folder`, whose samples are latents."""

    family: ClassVar[str]
    kind: ClassVar[str]
    """Class of the trained component in diffusers."""
    pipeline_kind: ClassVar[str]
    autoencoder: ClassVar[str] = "vae"

    encoder_dtype: torch.dtype = torch.float32
    """In which autoencoder and text encoders run; set before they are loaded."""

    def __init__(self, folder: Path, module: nn.Module, scheduler: Any) -> None:
        self.folder, self.module, self.scheduler = folder, module, scheduler

    @classmethod
    @abstractmethod
    def scheduler_of(cls, folder: Path) -> Any:
        """The training process of a pipeline folder. Raises UserError for a scheduler of another kind."""

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None) -> Self:
        module = opened_component(folder, cls.component, cls.kind, cls.family, dtype)
        return cls(folder, module, cls.scheduler_of(folder))

    def configure(self, settings: ModelSettings) -> None:
        self.encoder_dtype = getattr(torch, settings.encoder_dtype)

    def component_from(self, folder: Path) -> nn.Module:
        dtype = next(self.module.parameters()).dtype
        return loaded_component(part_of(folder, self.component), self.kind, dtype).eval()

    # -- the other parts ---------------------------------------------------------------------------

    @cached_property
    def pipeline(self) -> Any:
        """The stock pipeline with the base as its component, on the base's device. UserError where it is broken."""
        import diffusers

        own = {self.component: self.module}
        try:
            pipeline = getattr(diffusers, self.pipeline_kind).from_pretrained(
                self.folder, dtype=self.encoder_dtype, local_files_only=True, **own
            )
        except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"{self.folder}: no {self.pipeline_kind} that diffusers loads: {reason}") from None
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and part is not self.module:
                part.requires_grad_(False).eval().to(next(self.module.parameters()).device)
        return pipeline

    # -- encoding ----------------------------------------------------------------------------------

    def encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with `latent` and `condition`: as it is where it holds them (`data.encoded`), else encoded now."""
        if "latent" in batch:
            return batch
        return {**batch, "latent": self.encode_images(batch["image"]), "condition": self.encode_prompts(batch)}

    def encode_prompts(self, batch: dict[str, Any]) -> Condition:
        """The condition of a batch that holds `caption` or `label`."""
        if self.takes == "text":
            return self.encode_captions(batch["caption"])
        return self.encode_labels(batch["label"]) if self.takes == "class" else {}

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) in [-1, 1] -> latents as x_0, the mean of the autoencoder's posterior, in the model's dtype.

        Raises UserError where one is not finite: autoencoders overflow in float16.
        """
        vae = self.pipeline.vae
        own = next(vae.parameters())
        posterior = vae.encode(self.as_encoder_takes(images).to(own.device, own.dtype)).latent_dist
        latents: torch.Tensor = self.normalised(posterior.mode().float())
        if not bool(torch.isfinite(latents).all()):
            name = str(own.dtype).removeprefix("torch.")
            raise UserError(
                f"model.encoder_dtype: the autoencoder overflows in {name} (latents are not finite); use float32 or "
                "bfloat16"
            )
        return latents.to(next(self.module.parameters()))

    def as_encoder_takes(self, images: torch.Tensor) -> torch.Tensor:
        """Images as the autoencoder takes them; a video's adds an axis of frames."""
        return images

    def normalised(self, latents: torch.Tensor) -> torch.Tensor:
        """What the autoencoder gives -> x_0, by its config's shift and scale."""
        config = self.pipeline.vae.config
        shift: float = getattr(config, "shift_factor", None) or 0.0
        scale: float = config.scaling_factor
        return (latents - shift) * scale

    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """b captions -> what `predict` takes, each (b, ...); of a family that takes text."""
        raise NotImplementedError

    def encode_labels(self, labels: torch.Tensor) -> Condition:
        """Classes (b,), -1 for none -> what `predict` takes; of a family that takes classes."""
        raise NotImplementedError

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        """Of each caption, whether the tokenizer cuts it; what is said before captions are encoded."""
        return [False] * len(captions)

    # -- the forward process -----------------------------------------------------------------------

    @abstractmethod
    def diffused(self, clean: torch.Tensor, condition: Condition, t: torch.Tensor, noise: torch.Tensor) -> Noised:
        """x_t and target of clean latents."""

    def noised(self, batch: dict[str, Any], t: torch.Tensor, noise: torch.Tensor) -> Noised:
        batch = self.encoded(batch)
        return self.diffused(batch["latent"], batch["condition"], t, noise.to(batch["latent"].dtype))

    # -- shapes ------------------------------------------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, ...]:
        *_, height, width = self.sample_shape
        factor = self.downscaling
        return (int(self.vae_config.get("in_channels", 3)), height * factor, width * factor)

    @property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's config, without loading it."""
        return read_json(part_of(self.folder, self.autoencoder) / "config.json")

    @property
    def downscaling(self) -> int:
        """Pixels of an image along a side of one latent."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    # -- sampling ----------------------------------------------------------------------------------

    def asked(self, prompts: Sequence[Prompt], guidance_scale: float | None) -> dict[str, Any]:
        """Arguments by which the stock pipeline is asked for an image a prompt; None is the pipeline's own guidance."""
        options: dict[str, Any] = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        return {"prompt": ["" if prompt is None else str(prompt) for prompt in prompts], **options}

    @torch.no_grad()
    def generate(
        self,
        module: nn.Module,
        scheduler: Any,
        prompts: Sequence[Prompt],
        *,
        generators: list[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Images (b, c, h, w) in [-1, 1]: what the stock pipeline gives with `module` as its component.

        `options` go to the pipeline's call, as eta. Each image's noise is its generator's alone.
        """
        pipeline = self.pipeline
        kept = {self.component: self.module, "scheduler": pipeline.scheduler}
        pipeline.register_modules(**{self.component: module, "scheduler": scheduler})
        try:
            asked = {**self.asked(prompts, guidance_scale), "num_inference_steps": num_inference_steps, **options}
            images = pipeline(**asked, generator=generators, output_type="pt")[0]
        finally:
            pipeline.register_modules(**kept)
        return self.as_images(images) * 2 - 1

    def as_images(self, images: Any) -> torch.Tensor:
        """What the pipeline gives for output_type "pt" -> (b, c, h, w) in [0, 1]."""
        found: torch.Tensor = images
        return found
