"""What a run begins with: the images, and the pretrained model or how a base is built from scratch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deme_diffusion.config.base import Positive, Probability, Settings


class ModelSettings(Settings):
    """The pretrained model: `packaged:NAME`, a diffusers folder, or a hub name; null trains it by `pretrain`."""

    family: Literal["ddpm"] = "ddpm"
    pretrained: str | None = None
    revision: str | None = None


class AugmentSettings(Settings):
    """Random affine augmentation, per sample: pixels, degrees, and a relative scale; 0 is off."""

    shift: float = Field(0.0, ge=0.0)
    rotate: float = Field(0.0, ge=0.0, le=180.0)
    scale: float = Field(0.0, ge=0.0, lt=1.0)
    flip: Probability = 0.0


class DataSettings(Settings):
    """The images and how they are split (by pixel hash, before augmentation) into train, search and report."""

    source: Literal["digits", "folder", "parquet", "hub"] = "digits"
    path: str | None = Field(None, description="folder of images; parquet file or folder of them; hub name owner/name")
    revision: str | None = Field(None, description="hub: branch, tag or commit")
    subset: str | None = Field(None, description="hub: the data set's configuration, where it has several")
    split: str = Field("train", description="hub: the data set's own split or splits, as train+test")
    streaming: bool = Field(False, description="hub: read once in passing; only the prepared images are stored")
    max_images: Positive | None = Field(None, description="a fixed random choice of so many; of a stream, the first")
    image_column: str | None = Field(None, description="null: image, or else the only column that holds images")
    label_column: str | None = Field(None, description="null: label, where there is one")
    caption_column: str | None = Field(None, description="for families that take text; null is none")
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
            raise ValueError("path is given, but source digits is embedded; use source folder, parquet or hub")
        if self.source != "digits" and self.path is None:
            raise ValueError(f"source {self.source} needs a path")
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
