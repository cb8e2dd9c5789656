"""DiT: a class-conditional transformer on latents that also learns a variance, which stock sampling does not use."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.files import part_of
from deme_diffusion.models.denoiser import Condition, Prompt, Takes
from deme_diffusion.models.discrete import DiscreteDenoiser, check_prediction, discrete_scheduler
from deme_diffusion.models.latent import LatentDenoiser
from deme_diffusion.weight_files import read_json

INDEX = "model_index.json"
NULL = 1000
"""The class that `DiTPipeline` guides away from, whatever the model has been trained on."""
GUIDANCE = 4.0
"""`DiTPipeline`'s own."""


class DiT(DiscreteDenoiser, LatentDenoiser):
    """Peebles and Xie 2023. Trained on the noise alone: of a prediction twice as wide, the first half.

    Stock sampling takes that half as well, with the scheduler's variance instead of the learned one.
    """

    family: ClassVar[str] = "dit"
    component: ClassVar[str] = "transformer"
    kind: ClassVar[str] = "DiTTransformer2DModel"
    also: ClassVar[tuple[str, ...]] = ("Transformer2DModel",)
    pipeline_kind: ClassVar[str] = "DiTPipeline"
    takes: ClassVar[Takes] = "class"

    def __init__(self, folder: Path, module: nn.Module, scheduler: Any) -> None:
        super().__init__(folder, without_class_dropout(module), scheduler)

    @classmethod
    def check_config(cls, folder: Path, config: dict[str, Any]) -> None:
        where = part_of(folder, cls.component)
        if config.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
            raise UserError(f"{where}: norm_type {config['norm_type']!r}, but family {cls.family} needs ada_norm_zero")
        channels = config.get("in_channels", 4)
        if (config.get("out_channels") or channels) not in (channels, 2 * channels):
            raise UserError(
                f"{where}: {config['out_channels']} output channels for {channels} input channels; the noise, or the "
                "noise and its variance, are expected"
            )

    @classmethod
    def scheduler_of(cls, folder: Path) -> Any:
        scheduler = discrete_scheduler(folder, cls.family, unclipped=True)
        check_prediction(scheduler)
        return scheduler

    def component_from(self, folder: Path) -> nn.Module:
        return without_class_dropout(super().component_from(folder))

    # -- classes -----------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Classes 0, 1, ... that the model was trained on; this number itself stands for none."""
        config: Any = self.module.config
        return int(config.num_embeds_ada_norm)

    @property
    def class_names(self) -> dict[str, int]:
        """By `id2label` of the pipeline's index: whole, and each of several names that stands for one class only."""
        given = read_json(self.folder / INDEX).get("id2label") or {}
        called = {(name.strip(), int(i)) for i, names in given.items() for name in (names, *names.split(","))}
        meant = Counter(name for name, _ in called)
        return {name: i for name, i in sorted(called) if meant[name] == 1}

    def encode_labels(self, labels: torch.Tensor) -> Condition:
        """`class_labels` (b,) int64, the null class for -1. Raises UserError for a class that the model lacks."""
        low, high = (int(value) for value in labels.aminmax())
        if low < -1 or high >= self.num_classes:
            raise UserError(
                f"label {high if high >= self.num_classes else low}: {self.folder} knows classes 0 to "
                f"{self.num_classes - 1}, and -1 for none"
            )
        return {"class_labels": torch.where(labels < 0, self.num_classes, labels)}

    def placeholder(self, count: int) -> Condition:
        return {"class_labels": torch.zeros(count, dtype=torch.int64, device=next(self.module.parameters()).device)}

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        options = {"timestep": t.expand(len(x_t)), "return_dict": False, **condition}
        prediction: torch.Tensor = module(x_t, **options)[0]
        return prediction[:, : x_t.shape[1]]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        config: Any = self.module.config
        return (config.in_channels, config.sample_size, config.sample_size)

    # -- sampling ----------------------------------------------------------------------------------

    def asked(self, prompts: Sequence[Prompt], guidance_scale: float | None) -> dict[str, Any]:
        classes = self.encode_labels(torch.tensor([self._class(prompt) for prompt in prompts]))["class_labels"]
        scale = GUIDANCE if guidance_scale is None else guidance_scale
        if scale > 1 and self.num_classes != NULL:
            raise UserError(
                f"guidance_scale {scale:g}: the stock DiTPipeline guides models of {NULL} classes only, and "
                f"{self.folder} has {self.num_classes}; sample with guidance_scale=1"
            )
        return {"class_labels": classes.tolist(), "guidance_scale": scale}

    def _class(self, prompt: Prompt) -> int:
        """A class by its number, or by its name where the pipeline's index has names."""
        if prompt is None or isinstance(prompt, int):
            return -1 if prompt is None else prompt
        if prompt.lstrip("-").isdigit():
            return int(prompt)
        labels: dict[str, int] = self.pipeline.labels
        if prompt and prompt not in labels:
            raise UserError(f"{self.folder}: no class is named {prompt!r}{nearest(prompt, labels)}")
        return labels[prompt] if prompt else -1

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
        """As every family's; of the noise that a sampler draws on its way too, each image has its own.

        `DiTPipeline` itself draws it from the global generator.
        """
        if abs(float(scheduler.init_noise_sigma) - 1) > 1e-6:
            raise UserError(
                f"sampler: {type(scheduler).__name__} scales its latents, which the stock DiTPipeline does not do; use "
                "DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler"
            )
        guided = (GUIDANCE if guidance_scale is None else guidance_scale) > 1
        asked: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        with _noise_of(scheduler, generators * 2 if guided else generators, options.pop("eta", 0.0)):
            return super().generate(module, scheduler, prompts, generators=generators, **asked, **options)


def without_class_dropout(module: nn.Module) -> nn.Module:
    """The module in place, less the dropping of classes in training, which draws from the global generator.

    Classes are dropped by the data (`decouple.proportion_empty_prompts`).
    """
    from diffusers.models.embeddings import LabelEmbedding

    for part in module.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0.0
    return module


@contextmanager
def _noise_of(scheduler: Any, generators: list[torch.Generator], eta: float) -> Iterator[None]:
    """A scheduler whose steps draw from these generators, of which a guided batch has two an image."""
    accepted = inspect.signature(scheduler.step).parameters
    given = {key: value for key, value in (("generator", generators), ("eta", eta)) if key in accepted}
    before = vars(scheduler).get("step")
    scheduler.step = partial(scheduler.step, **given)
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before
