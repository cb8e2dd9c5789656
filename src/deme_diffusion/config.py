"""Every stage's settings: frozen, typed, refusing unknown keys by the nearest name; YAML in, YAML out. No torch.

A recipe is one `Recipe`. Settings that diffusers' scripts have keep their names there. Every technique has an off
value, so an ablation is one override.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Settings(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def changed(self) -> dict[str, Any]:
        """Settings that differ from their defaults: what a digest covers, so that new settings orphan nothing."""
        return self.model_dump(mode="json", exclude_defaults=True)


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

    source: Literal["digits"] = "digits"
    search_fraction: Probability = 0.15
    report_fraction: Probability = 0.25
    augment: AugmentSettings = AugmentSettings()
    views: Positive = Field(1, description="views of each held-out image; above 1 they are augmented as in training")

    @model_validator(mode="after")
    def _leave_training_images(self) -> Self:
        if self.search_fraction + self.report_fraction >= 1.0:
            raise ValueError("search_fraction + report_fraction must stay below 1: nothing is left to train on")
        return self


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


class TrainSettings(Settings):
    """Optimisation of one model; names are those of diffusers' training scripts, defaults the public DeMe script's."""

    learning_rate: float = Field(5e-5, ge=0.0)
    train_batch_size: Positive = 16
    gradient_accumulation_steps: Positive = 1
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    lr_warmup_steps: NonNegative = 0
    max_grad_norm: float = Field(1.0, gt=0.0)
    adam_beta1: float = Field(0.95, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    adam_weight_decay: float = Field(1e-6, ge=0.0)
    adam_epsilon: float = Field(1e-8, gt=0.0)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    snr_gamma: float | None = Field(None, gt=0.0, description="Min-SNR loss weighting (Hang et al. 2023); null is off")
    use_ema: bool = True
    ema_inv_gamma: float = Field(1.0, gt=0.0)
    ema_power: float = Field(0.75, gt=0.0)
    ema_max_decay: float = Field(0.9999, ge=0.0, lt=1.0)
    validation_steps: Positive = Field(500, description="steps between fixed-noise losses on the search split")
    keep: Literal["best", "last"] = Field("last", description="which weights the artefact holds, by validation loss")
    early_stopping: NonNegative = Field(0, description="validations without a better loss before stopping; 0 is off")

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _unquoted_no(cls, value: object) -> object:
        return "no" if value is False else value  # what YAML makes of an unquoted `no`


class PretrainSettings(TrainSettings):
    """The base from scratch: one model on all timesteps, no teacher."""

    total_steps: Positive = 10_000
    unet: UNetSettings = UNetSettings()
    scheduler: ScheduleSettings = ScheduleSettings()


class DecoupleSettings(TrainSettings):
    """N experts (Sec. 3.1, 3.2). `total_steps` is the whole budget, split evenly over the experts."""

    num_ranges: Positive = 4
    division: Literal["uniform"] = "uniform"
    global_prob: Probability = Field(0.3, description="the paper's p (Eq. 6): share of timesteps from all of [0,T)")
    consistency_weight: float = Field(1.0, ge=0.0, description="weight of the loss to the teacher (Eq. 5)")
    projection: Literal["none", "residual"] = "residual"
    total_steps: Positive = 80_000
    range_steps: tuple[Positive, ...] | None = Field(None, description="steps of each expert instead of an even split")
    range_learning_rates: tuple[Annotated[float, Field(ge=0.0)], ...] | None = None

    @model_validator(mode="after")
    def _one_value_a_range(self) -> Self:
        for name in ("range_steps", "range_learning_rates"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_ranges:
                raise ValueError(f"{name} has {len(values)} values for num_ranges={self.num_ranges}")
        if self.range_steps is None and self.total_steps < self.num_ranges:
            raise ValueError(f"total_steps={self.total_steps} leaves no step for each of {self.num_ranges} experts")
        return self

    def steps_of(self, index: int) -> int:
        """Steps of one expert; the even split gives the first ones the remainder, so that the budget is exact."""
        if self.range_steps is not None:
            return self.range_steps[index]
        share, rest = divmod(self.total_steps, self.num_ranges)
        return share + (index < rest)

    @property
    def budget(self) -> int:
        """Steps of all experts together: what the all-timesteps control gets."""
        return sum(self.steps_of(i) for i in range(self.num_ranges))


class SamplerSettings(Settings):
    """A diffusers scheduler by class name and how it is stepped."""

    name: str = "DDIMScheduler"
    num_inference_steps: Positive = 50
    eta: Probability = 0.0
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None

    @property
    def label(self) -> str:
        """Short name of a table's column: `DDIM-50`."""
        eta = f"-eta{self.eta:g}" if self.eta else ""
        spacing = f"-{self.timestep_spacing}" if self.timestep_spacing else ""
        return f"{self.name.removesuffix('Scheduler')}-{self.num_inference_steps}{eta}{spacing}"


class ExtractorSettings(Settings):
    """The feature extractor that names the metric: `packaged:NAME`, or null to train one (`deme extractor`)."""

    pretrained: str | None = "packaged:digits-cnn"
    channels: Positive = 32
    features: Positive = 64
    total_steps: Positive = 3000
    train_batch_size: Positive = 128
    learning_rate: float = Field(2e-3, gt=0.0)


class LossSettings(Settings):
    """The fixed-noise loss: every held-out view at `draws` timesteps of each range, noise and t keyed by the seed."""

    draws: Positive = 4
    seed: int = 0


class MergeSettings(Settings):
    """How the experts become one model (Sec. 3.3); `method=none` serves the ensemble, `search=none` is uniform."""

    method: Literal["task_arithmetic", "none"] = "task_arithmetic"
    weights: tuple[float, ...] | None = Field(None, description="given weights, one an expert; needs search=none")
    search: Literal["none", "least_squares", "grid"] = "least_squares"
    ridge: float = Field(1e-3, ge=0.0, description="pull of least squares towards 0, relative to A's mean diagonal")
    scales: tuple[float, ...] = Field((0.5, 1.0, 1.5), description="multiples of the least-squares weights to score")
    grid_values: tuple[float, ...] = Field((0.0, 0.25, 0.5), description="values a weight takes in the grid")
    max_evaluations: Positive = Field(128, description="a search that would score more candidates is refused")
    num_images: Positive = Field(1000, description="images a candidate is scored on, with common seeds")
    sampler: SamplerSettings = SamplerSettings(num_inference_steps=20)

    @model_validator(mode="after")
    def _weights_or_search(self) -> Self:
        if self.weights is not None and self.search != "none":
            raise ValueError(f"weights are given, so search must be none, not {self.search}")
        return self


class EvaluateSettings(Settings):
    """What the table measures; the reference is the report split."""

    samplers: tuple[SamplerSettings, ...] = (
        SamplerSettings(),
        SamplerSettings(name="DDPMScheduler", num_inference_steps=100),
    )
    num_images: Positive = 10_000
    sampling_seeds: Positive = Field(1, description="sets of images a model; seeds differ between training seeds")
    loss: LossSettings = LossSettings()
    neighbours: Positive = Field(3, description="k of precision and recall")
    controls: tuple[Literal["all-timesteps", "soup", "all-timesteps-searched"], ...] = ("all-timesteps",)

    @model_validator(mode="after")
    def _two_samplers(self) -> Self:
        if len({s.label for s in self.samplers}) < 2:
            raise ValueError("samplers: at least two different ones, since a gain under one alone is no gain")
        return self


class RuntimeSettings(Settings):
    """What changes no result, and stays out of every digest."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="one of several GPUs: CUDA_VISIBLE_DEVICES")
    jobs: Positive = Field(1, description="experts trained at once, each in its own process")
    threads: NonNegative = Field(0, description="CPU threads of a process; 0 divides the cores among the jobs")
    dataloader_num_workers: NonNegative = 0
    checkpointing_steps: Positive = 500
    checkpoints_total_limit: Positive = 1
    logging_steps: Positive = 50
    preview_steps: NonNegative = Field(0, description="steps between preview grids; 0 is off")
    sample_batch_size: Positive = 256
    resident_experts: Positive = Field(8, description="most experts of an ensemble in memory at once")


class Recipe(Settings):
    """A whole run. `seeds` are training seeds: each repeats everything that is random, and the table shows spread."""

    name: str = Field("recipe", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    demonstration: bool = Field(False, description="label the run as a demonstration, not evidence")
    seeds: tuple[NonNegative, ...] = Field((0,), min_length=1)
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    pretrain: PretrainSettings = PretrainSettings()
    extractor: ExtractorSettings = ExtractorSettings()
    decouple: DecoupleSettings = DecoupleSettings()
    merge: MergeSettings = MergeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        weights, ranges = self.merge.weights, self.decouple.num_ranges
        if weights is not None and len(weights) != ranges:
            raise ValueError(f"merge.weights has {len(weights)} values for decouple.num_ranges={ranges}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} holds one seed twice")
        if "all-timesteps-searched" in self.evaluate.controls and "all-timesteps" not in self.evaluate.controls:
            raise ValueError("evaluate.controls: all-timesteps-searched needs all-timesteps beside it")
        return self
