"""What a run begins with: the images, and the pretrained model or how a base is built from scratch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deme_diffusion.config.base import Positive, Probability, Settings

Precision = Literal["float32", "bfloat16", "float16"]
TAKES: dict[str, Literal["nothing", "class", "text"]] = {
    "ddpm": "nothing",
    "dit": "class",
    "stable_diffusion": "text",
    "stable_diffusion_xl": "text",
    "stable_diffusion_3": "text",
    "flux": "text",
    "wan": "text",
}
"""Family -> what it is conditioned on. All but ddpm denoise the latents of an autoencoder."""
FLOW = ("stable_diffusion_3", "flux", "wan")
"""Families of flow matching."""
OF_ONE = {"num_frames": "wan", "training_guidance": "flux"}
"""Settings that one family has."""
MOST_TOKENS = {"stable_diffusion_3": 512, "flux": 512}
"""Tokens of T5 at most, where the stock pipeline refuses more."""


class ModelSettings(Settings):
    """The pretrained model: `packaged:NAME`, a diffusers folder, or a hub name; null trains it by `pretrain`."""

    family: Literal["ddpm", "dit", "stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "wan"] = (
        Field("ddpm", description="stable_diffusion: 1.x and 2.x; dit: class-conditional; wan: image or video latents")
    )
    pretrained: str | None = None
    revision: str | None = None
    dtype: Precision = Field(
        "float32", description="in which the base is held and sampled; full finetuning trains float32 copies of it"
    )
    encoder_dtype: Precision = Field("float32", description="in which autoencoder and text encoders run")
    weighting_scheme: Literal["family", "uniform", "logit_normal", "mode"] = Field(
        "family", description="flow matching: density of t (Esser et al. 2024); family: as its training script has it"
    )
    logit_mean: float = Field(0.0, description="weighting_scheme=logit_normal")
    logit_std: float = Field(1.0, gt=0.0, description="weighting_scheme=logit_normal")
    mode_scale: float = Field(1.29, description="weighting_scheme=mode")
    resolution: Positive | None = Field(
        None, description="flow matching: side of the images in pixels; null: the family's, as its checkpoint says"
    )
    num_frames: Positive = Field(
        1, description="wan: frames of a video; 1: images; above 1 each image is a video that stands still"
    )
    max_sequence_length: Positive | None = Field(
        None, description="flow matching: tokens of T5, at most 512; null: as the stock pipeline takes them"
    )
    training_guidance: float = Field(
        1.0,
        ge=0.0,
        description="flux: what a guidance-distilled model is told in training; diffusers' Flux scripts default to "
        "3.5, others train at 1",
    )

    @model_validator(mode="after")
    def _flow_agrees(self) -> Self:
        flow = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "resolution", "max_sequence_length")
        idle = () if self.flow else flow
        idle = (*idle, *(key for key, family in OF_ONE.items() if family != self.family))
        if said := [key for key in idle if key in self.changed()]:
            families = OF_ONE.get(said[0], ", ".join(FLOW))
            raise ValueError(f"model.{said[0]}: family {self.family} does not know it ({families} do); leave it out")
        if self.family in MOST_TOKENS and (self.max_sequence_length or 0) > MOST_TOKENS[self.family]:
            most = MOST_TOKENS[self.family]
            raise ValueError(f"max_sequence_length: {self.max_sequence_length}; {self.family} takes at most {most}")
        return self

    @property
    def flow(self) -> bool:
        """Whether the family matches flows, on sigmas instead of a schedule of betas."""
        return self.family in FLOW

    @property
    def takes(self) -> Literal["nothing", "class", "text"]:
        """What the family is conditioned on."""
        return TAKES[self.family]

    @property
    def latent(self) -> bool:
        """Whether the family denoises latents of an autoencoder."""
        return self.family != "ddpm"

    def shaping(self) -> dict[str, Any]:
        """Settings beside the files that shape what the base is: what its digest covers, where they are not default."""
        return {key: value for key, value in self.changed().items() if key not in ("family", "pretrained", "revision")}


class CacheSettings(Settings):
    """Latents and text embeddings computed once and shared by all experts (`deme cache`), of a latent family."""

    enabled: bool = Field(True, description="false: images and captions are encoded anew at every step")
    views: Positive | None = Field(
        None,
        description="stored views of each training image, of which a step draws one; null: 4 where images are "
        "augmented or cropped at random, else 1",
    )
    dtype: Precision = Field("float16", description="of what is stored")
    batch_size: Positive = Field(32, description="images or captions encoded at once")
    shard_size: str = Field("1GB", description="of the safetensors files at most")
    folder: str | None = Field(None, description="a cache made elsewhere by deme cache, for this model and data")


class AugmentSettings(Settings):
    """Random affine augmentation, per sample: pixels, degrees, and a relative scale; 0 is off."""

    shift: float = Field(0.0, ge=0.0)
    rotate: float = Field(0.0, ge=0.0, le=180.0)
    scale: float = Field(0.0, ge=0.0, lt=1.0)
    flip: Probability = 0.0


class DataSettings(Settings):
    """The images and how they are split (by pixel hash, before augmentation) into train, search and report."""

    source: Literal["digits", "folder", "parquet", "hub", "webdataset"] = "digits"
    path: str | None = Field(
        None, description="folder of images; parquet or .tar (webdataset) file or folder of them; hub name owner/name"
    )
    revision: str | None = Field(None, description="hub: branch, tag or commit")
    subset: str | None = Field(None, description="hub: the data set's configuration, where it has several")
    split: str = Field("train", description="hub: the data set's own split or splits, as train+test")
    streaming: bool = Field(False, description="hub: read once in passing; only the prepared images are stored")
    max_images: Positive | None = Field(None, description="a fixed random choice of so many; of a stream, the first")
    image_column: str | None = Field(None, description="null: image, or else the only column that holds images")
    label_column: str | None = Field(None, description="null: label, where there is one")
    caption_column: str | None = Field(
        None, description="for families that take text, as text or json.caption; null: text, caption or txt"
    )
    missing_captions: Literal["refuse", "empty"] = Field("refuse", description="empty: such images train without text")
    mode: Literal["RGB", "L"] = Field("RGB", description="colour or grey; what is otherwise is converted")
    resolution: Positive | None = Field(None, description="the shorter side is resized to it; null keeps the sizes")
    interpolation: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"
    crop: Literal["center", "random"] = Field("center", description="to a square; random in training only")
    max_corrupt: Probability = Field(0.01, description="share of unreadable images that is skipped; more is refused")
    search_fraction: Probability = 0.15
    report_fraction: Probability = 0.25
    augment: AugmentSettings = AugmentSettings()
    views: Positive = Field(1, description="views of each held-out image; above 1 they are augmented as in training")

    @model_validator(mode="after")
    def _leave_training_images(self) -> Self:
        if self.search_fraction + self.report_fraction >= 1.0:
            raise ValueError("search_fraction + report_fraction must stay below 1: nothing is left to train on")
        return self

    @model_validator(mode="after")
    def _path_fits_source(self) -> Self:
        if self.source == "digits" and self.path is not None:
            raise ValueError("path is given, but source digits is embedded; use folder, parquet, hub or webdataset")
        if self.source != "digits" and self.path is None:
            raise ValueError(f"source {self.source} needs a path")
        if self.source == "digits" and self.caption_column is not None:
            raise ValueError("caption_column is given, but the digits have captions of their own; leave it null")
        if self.crop == "random" and self.resolution is None:
            raise ValueError("crop=random needs a resolution: the side of the square")
        if self.streaming and self.source != "hub":
            raise ValueError(f"streaming is for source hub, not {self.source}")
        return self


class SimilaritySettings(Settings):
    """Gradient similarity between timesteps (Fig. 1a): cosines of the pretrained model's gradients over K bins."""

    bins: Positive = Field(20, description="K: [0,T) in as many equal bins")
    num_images: Positive = Field(256, description="images of the train split that each bin's gradient is taken on")
    sketch: Positive = Field(4096, description="dimensions that gradients are projected to, by seeded random signs")
    seed: int = 0


class UNetSettings(Settings):
    """Architecture of a base trained from scratch: arguments of diffusers' `UNet2DModel`."""

    sample_size: Positive = 8
    in_channels: Positive = 1
    layers_per_block: Positive = 1
    block_out_channels: tuple[Positive, ...] = (16, 32)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D")
    norm_num_groups: Positive = 8
    attention_head_dim: Positive = 8
    dropout: Probability = 0.0


class ScheduleSettings(Settings):
    """Noise schedule of a base trained from scratch: arguments of diffusers' `DDPMScheduler`."""

    num_train_timesteps: Positive = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = Field(1e-4, gt=0.0)
    beta_end: float = Field(0.02, gt=0.0, lt=1.0)
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
