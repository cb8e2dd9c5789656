"""How one model is trained: the base from scratch, and the experts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from deme_diffusion.config.base import NonNegative, Positive, Probability, Settings
from deme_diffusion.config.inputs import ScheduleSettings, UNetSettings


class TrainSettings(Settings):
    """Optimisation of one model; names are those of diffusers' training scripts, defaults the public DeMe script's."""

    learning_rate: float = Field(5e-5, ge=0.0)
    train_batch_size: Positive = 16
    gradient_accumulation_steps: Positive = 1
    processes: Positive = Field(
        1, description="processes that train one model, each on train_batch_size; their launcher sets it"
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    lr_warmup_steps: NonNegative = 0
    max_grad_norm: float = Field(1.0, gt=0.0)
    adam_beta1: float = Field(0.95, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    adam_weight_decay: float = Field(1e-6, ge=0.0)
    adam_epsilon: float = Field(1e-8, gt=0.0)
    use_8bit_adam: bool = Field(False, description="bitsandbytes' AdamW8bit, on a GPU (extra `8bit`)")
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    allow_tf32: bool = Field(False, description="TF32 matrix products and convolutions on a GPU; false: in float32")
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
    timestep_sampling: Literal["per_sample", "per_batch"] = Field(
        "per_sample", description="a coin of global_prob for each sample, or, as the public script, for each batch"
    )
    antithetic: bool = Field(False, description="mirrored pairs (t, lo + hi - 1 - t), as the public script")
    consistency_weight: float = Field(1.0, ge=0.0, description="weight of the loss to the teacher (Eq. 5)")
    teacher: Literal["frozen", "ema"] = Field(
        "frozen", description="ema: the student's own average takes its place, an accident of the public script"
    )
    teacher_update_steps: Positive = Field(500, description="teacher=ema: steps between its renewals")
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="in which the frozen teacher is held and run; half of its memory"
    )
    projection: Literal["none", "residual", "block"] = Field(
        "residual", description="after what always folds; after every block as in the paper; none"
    )
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

    @model_validator(mode="after")
    def _teacher_is_possible(self) -> Self:
        if self.teacher == "ema" and not self.use_ema:
            raise ValueError("teacher=ema needs use_ema=true")
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
