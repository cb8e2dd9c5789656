"""Models that denoise the latents of an autoencoder: encoding of images and captions, sampling by the stock pipeline.

The pipeline's other parts (autoencoder, text encoders, tokenizers) are loaded when something is to be encoded or
sampled, and not before: a training on a cache of latents and embeddings never touches them.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from deme_diffusion.config import ModelSettings
from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.models.casting import Cast
from deme_diffusion.models.components import check_parts, checked_component, loaded_component, quiet
from deme_diffusion.models.denoiser import Condition, Denoiser, Noised, Prompt
from deme_diffusion.models.precision import computes_in, wide
from deme_diffusion.weight_files import read_json


class LatentDenoiser(Denoiser):
    """A component of the stock pipeline `pipeline_kind` in `folder`, whose samples are latents."""

    family: ClassVar[str]
    kind: ClassVar[str]
    """Class of the trained component in diffusers."""
    also: ClassVar[tuple[str, ...]] = ()
    """Other names of that class in config files."""
    pipeline_kind: ClassVar[str]
    autoencoder: ClassVar[str] = "vae"
    parts: ClassVar[tuple[str, ...]] = ("vae",)
    """What a pipeline folder must hold beside the component and the scheduler."""
    pipeline_options: ClassVar[dict[str, Any]] = {}
    """What the stock pipeline is loaded with beside its folder, such as None for a part that is never run."""

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
        component = checked_component(folder, cls.component, (cls.kind, *cls.also), cls.family)
        cls.check_config(folder, read_json(component / "config.json"))
        check_parts(folder, ("scheduler", *cls.parts), cls.family)
        scheduler = cls.scheduler_of(folder)
        return cls(folder, loaded_component(component, cls.kind, dtype), scheduler)

    @classmethod
    def check_config(cls, folder: Path, config: dict[str, Any]) -> None:
        """Raises UserError for a component of the right class that this family does not train."""

    def configure(self, settings: ModelSettings) -> None:
        self.encoder_dtype = getattr(torch, settings.encoder_dtype)

    def component_from(self, folder: Path) -> nn.Module:
        return loaded_component(part_of(folder, self.component), self.kind, computes_in(self.module)).eval()

    # -- the other parts ---------------------------------------------------------------------------

    @cached_property
    def pipeline(self) -> Any:
        """The stock pipeline with the base as its component, on the base's device. UserError where it is broken."""
        import diffusers

        options = {self.component: self.module, **self.pipeline_options}
        try:
            with quiet("diffusers", "transformers"):
                pipeline = getattr(diffusers, self.pipeline_kind).from_pretrained(
                    self.folder, dtype=self.encoder_dtype, local_files_only=True, **options
                )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # its three libraries raise a dozen kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.folder}: no {self.pipeline_kind} that diffusers loads: {reason[:300]}") from None
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and part is not self.module:
                part.requires_grad_(False).eval()
        return self._placed(pipeline, next(self.module.parameters()).device)

    def _placed(self, pipeline: Any, device: torch.device) -> Any:
        """The pipeline with its other parts on a device: that of what is encoded, or of what samples."""
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and name != self.component and next(part.parameters()).device != device:
                part.to(device)
        return pipeline

    def release(self) -> None:
        """Drop the other parts from memory; they are loaded again when something is to be encoded or sampled."""
        self.__dict__.pop("pipeline", None)

    # -- encoding ----------------------------------------------------------------------------------

    def encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with `latent` and `condition`: those that it holds (`data.encoded`), what it lacks encoded now."""
        latent = batch["latent"] if "latent" in batch else self.encode_images(batch["image"])
        condition = batch["condition"] if "condition" in batch else self.encode_prompts(batch)
        return {**batch, "latent": latent, "condition": condition}

    def encode_prompts(self, batch: dict[str, Any]) -> Condition:
        """The condition of a batch that holds `caption` or `label`."""
        if self.takes == "text":
            return self.encode_captions(batch["caption"])
        return self.encode_labels(batch["label"]) if self.takes == "class" else {}

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) in [-1, 1] -> latents as x_0, the mean of the autoencoder's posterior, in float32.

        Raises UserError where one is not finite: autoencoders overflow in float16.
        """
        own = next(self.module.parameters()).device
        # The base may wait in CPU memory while a copy of it teaches; images may not be on the device yet.
        vae = self._placed(self.pipeline, own if images.device.type == "cpu" else images.device).vae
        found = vae.encode(self.as_encoder_takes(images).to(next(vae.parameters())))
        # AutoencoderTiny gives latents, all others a posterior.
        latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return self.finite(self.normalised(latents.float()), "the autoencoder")

    def as_encoder_takes(self, images: torch.Tensor) -> torch.Tensor:
        """Images as the autoencoder takes them; a video's adds an axis of frames."""
        return images

    def normalised(self, latents: torch.Tensor) -> torch.Tensor:
        """What the autoencoder gives -> x_0, by its config's shift and scale."""
        config = self.pipeline.vae.config
        shift: float = getattr(config, "shift_factor", None) or 0.0
        scale: float = config.scaling_factor
        return (latents - shift) * scale

    def in_precision(self, **condition: torch.Tensor) -> Condition:
        """What text encoders gave, in the base's precision. Raises UserError where it is not finite."""
        dtype = computes_in(self.module)
        return {name: self.finite(value, "a text encoder").to(dtype) for name, value in condition.items()}

    def finite(self, encoded: torch.Tensor, what: str) -> torch.Tensor:
        """What an encoder gave. Raises UserError where it is not finite: encoders overflow in float16."""
        if bool(torch.isfinite(encoded).all()):
            return encoded
        name = str(self.encoder_dtype).removeprefix("torch.")
        wider = "; use bfloat16 or float32" if self.encoder_dtype == torch.float16 else "; its weights may be broken"
        raise UserError(
            f"model.encoder_dtype: {what} of {self.folder} gives numbers that are not finite in {name}{wider}"
        )

    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """b captions -> what `predict` takes, each (b, ...); of a family that takes text."""
        raise NotImplementedError

    def encode_labels(self, labels: torch.Tensor) -> Condition:
        """Classes (b,), -1 for none -> what `predict` takes; of a family that takes classes."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Classes 0, 1, ... that the model was trained on; of a family that takes classes."""
        return 0

    @property
    def class_names(self) -> dict[str, int]:
        """Those that the pipeline names."""
        return {}

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        """Of each caption, whether the tokenizer cuts it; what is said before captions are encoded."""
        return [False] * len(captions)

    # -- the forward process -----------------------------------------------------------------------

    @abstractmethod
    def diffused(self, clean: torch.Tensor, condition: Condition, t: torch.Tensor, noise: torch.Tensor) -> Noised:
        """x_t and target of clean latents."""

    def noised(self, batch: dict[str, Any], t: torch.Tensor, noise: torch.Tensor) -> Noised:
        batch = self.encoded(batch)
        # In float32 whatever the model computes in: in bfloat16 abar_t of the first timesteps is 1, and noise is 0.
        clean = wide(batch["latent"])
        if clean.shape[1:] != self.sample_shape:
            had, taken = ("x".join(map(str, shape)) for shape in (clean.shape[1:], self.sample_shape))
            raise UserError(
                f"latents of {had}, but {self.folder} takes {taken} as the recipe has it; make the cache anew, or "
                "check data.resolution and model.resolution"
            )
        return self.diffused(clean, batch["condition"], t, noise.to(clean.dtype))

    # -- shapes ------------------------------------------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, ...]:
        *_, height, width = self.sample_shape
        factor = self.downscaling
        return (int(self.vae_config.get("in_channels", 3)), height * factor, width * factor)

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's config, without loading it."""
        return read_json(part_of(self.folder, self.autoencoder) / "config.json")

    @property
    def downscaling(self) -> int:
        """Pixels of an image along a side of one latent."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    def zeros(self, **shapes: tuple[int, ...]) -> Condition:
        """Zeros of these shapes as a condition, in the base's precision and on its device."""
        dtype, device = computes_in(self.module), next(self.module.parameters()).device
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}

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
        with self._standing_in(module, scheduler) as pipeline, quiet("diffusers", "transformers"):
            taken = inspect.signature(pipeline.__call__).parameters
            asked = {**self.asked(prompts, guidance_scale), "num_inference_steps": num_inference_steps, **options}
            if not asked.get("eta") and "eta" not in taken:
                asked.pop("eta", None)
            images = pipeline(**asked, generator=generators, output_type="pt")[0]
        # Elsewhere it is the model's own fault, which who samples it tells.
        images = self.finite(images, "the autoencoder") if self.encoder_dtype == torch.float16 else images
        return self.as_images(images) * 2 - 1

    @contextmanager
    def _standing_in(self, module: nn.Module, scheduler: Any) -> Iterator[Any]:
        """The stock pipeline with another component and scheduler; with its own ones again afterwards."""
        pipeline = self._placed(self.pipeline, next(module.parameters()).device)
        kept = {self.component: self.module, "scheduler": pipeline.scheduler}
        if computes_in(module) != self.encoder_dtype:
            module = Cast(module, self.encoder_dtype)
        pipeline.register_modules(**{self.component: module, "scheduler": scheduler})
        try:
            yield pipeline
        finally:
            pipeline.register_modules(**kept)

    def as_images(self, images: Any) -> torch.Tensor:
        """What the pipeline gives for output_type "pt" -> (b, c, h, w) in [0, 1]."""
        found: torch.Tensor = images
        return found
