"""How models are sampled and measured."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deme_diffusion.config.base import Positive, Probability, Settings

DIGITS_CNN = "packaged:digits-cnn"
"""The packaged classifier of the digits; a space for no other images."""


class SamplerSettings(Settings):
    """A diffusers scheduler by class name and how it is stepped."""

    name: str = "DDIMScheduler"
    num_inference_steps: Positive = 50
    eta: Probability = 0.0
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    guidance_scale: float | None = Field(
        None, ge=0.0, description="classifier-free guidance; null: the stock pipeline's own default"
    )

    @property
    def label(self) -> str:
        """Short name of a table's column: `DDIM-50`."""
        eta = f"-eta{self.eta:g}" if self.eta else ""
        spacing = f"-{self.timestep_spacing}" if self.timestep_spacing else ""
        guidance = "" if self.guidance_scale is None else f"-cfg{self.guidance_scale:g}"
        return f"{self.name.removesuffix('Scheduler')}-{self.num_inference_steps}{eta}{spacing}{guidance}"


class ExtractorSettings(Settings):
    """The feature extractor that names the metric.

    `classifier`: `packaged:NAME`, a folder, or null to train one on the recipe's labels (`deme extractor`); where it is
    not said, a recipe on the digits takes packaged:digits-cnn, and any other trains one.
    `inception`: the published FID weights, a local file or null for the download. `transformers`: a vision model
    (DINOv2, CLIP), a folder or a hub name.
    """

    kind: Literal["classifier", "inception", "transformers"] = "classifier"
    pretrained: str | None = Field(None, description="with kind classifier on the digits: packaged:digits-cnn")
    revision: str | None = None
    channels: Positive = 32
    stages: Positive = Field(1, description="times that the classifier halves the resolution")
    features: Positive = 64
    total_steps: Positive = 3000
    train_batch_size: Positive = 128
    learning_rate: float = Field(2e-3, gt=0.0)

    @model_validator(mode="after")
    def _transformers_has_a_name(self) -> Self:
        if self.kind == "transformers" and self.pretrained is None:
            raise ValueError("kind transformers needs pretrained: a folder or a hub name, as facebook/dinov2-base")
        return self


class LossSettings(Settings):
    """The fixed-noise loss: every held-out view at `draws` timesteps of each range, noise and t keyed by the seed."""

    num_images: Positive | None = Field(None, description="the first so many images of the split; null is all")
    draws: Positive = 4
    seed: int = 0


class PromptSettings(Settings):
    """What images are asked for where the model takes text or classes, and what they are compared with.

    `report`: the captions or classes of the report split, which is the reference. `coco30k`, `imagenet1k`, `parti`: the
    paper's (Table 2), from files at `path`, compared with `images` where FD is to be measured; coco30k takes COCO's
    captions_val2014.json, or a list of prompts such as BK-SDM's own 30,000 (metadata.csv). `file`: any prompts.
    """

    protocol: Literal["report", "coco30k", "imagenet1k", "parti", "file"] = "report"
    path: str | None = Field(
        None,
        description="captions .json, or prompts .csv (a column text), .txt, .jsonl (coco30k); PartiPrompts .tsv; "
        "classes .txt; any prompts",
    )
    images: str | None = Field(None, description="folder of the reference images of FD; parti has none")
    seed: int = Field(0, description="of the choice among more prompts than images")


class ClipSettings(Settings):
    """The model of the CLIP score: a transformers CLIP by hub name or folder; null trains a small one (`deme clip`).

    BK-SDM's published scores (Kim et al. 2023) are those of ViT-g-14 laion2b_s34b_b88k; other CLIPs give other scores.
    """

    pretrained: str | None = None
    revision: str | None = None
    embedding: Positive = Field(32, description="width of the common space of one trained here")
    total_steps: Positive = 1500
    train_batch_size: Positive = 64
    learning_rate: float = Field(2e-3, gt=0.0)


class EvaluateSettings(Settings):
    """What the table measures; the reference is the report split."""

    samplers: tuple[SamplerSettings, ...] = (
        SamplerSettings(),
        SamplerSettings(name="DDPMScheduler", num_inference_steps=100),
    )
    num_images: Positive = 10_000
    sampling_seeds: Positive = Field(1, description="sets of images a model; seeds differ between training seeds")
    loss: LossSettings = LossSettings()
    loss_ranges: Positive | None = Field(
        None, description="equal ranges that the loss is told by; null: those that the experts serve"
    )
    neighbours: Positive = Field(3, description="k of precision and recall")
    density_neighbours: Positive = Field(5, description="k of density and coverage")
    reference_statistics: str | None = Field(
        None, description="a published .npz (mu, sigma): a second FD, against these instead of the report split"
    )
    prompts: PromptSettings = PromptSettings()
    clip_score: bool = Field(False, description="the CLIP score of each image with its prompt, by the model of `clip`")
    controls: tuple[Literal["all-timesteps", "soup", "all-timesteps-searched"], ...] = ("all-timesteps",)

    @model_validator(mode="after")
    def _two_samplers(self) -> Self:
        if len({s.label for s in self.samplers}) < 2:
            raise ValueError("samplers: at least two different ones, since a gain under one alone is no gain")
        return self
