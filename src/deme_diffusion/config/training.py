"""How one model is trained: the base from scratch, and the experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

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
    loss_weighting: Literal["none", "snr_plus_one", "truncated_snr", "min_snr", "p2"] = Field(
        "none",
        description="weight of each timestep's loss: SNR + 1 and max(SNR, 1) (Salimans and Ho 2022), Min-SNR (gamma: "
        "snr_gamma, or 5), P2 (Choi et al. 2022); snr_gamma alone is min_snr",
    )
    p2_gamma: float = Field(1.0, ge=0.0, description="loss_weighting=p2: the exponent")
    p2_k: float = Field(1.0, gt=0.0, description="loss_weighting=p2: what is added to the SNR")
    proportion_empty_prompts: Probability = Field(
        0.0, description="share of samples without their caption or class, for classifier-free guidance; 0.1 is usual"
    )
    use_ema: bool = True
    ema_inv_gamma: float = Field(1.0, gt=0.0)
    ema_power: float = Field(0.75, gt=0.0)
    ema_max_decay: float = Field(0.9999, ge=0.0, lt=1.0)
    validation_steps: Positive = Field(500, description="steps between fixed-noise losses on the search split")
    keep: Literal["best", "last"] = Field("last", description="which weights the artefact holds, by validation loss")
    early_stopping: NonNegative = Field(0, description="validations without a better loss before stopping; 0 is off")

    @model_validator(mode="after")
    def _one_weighting(self) -> Self:
        if self.snr_gamma is not None and self.loss_weighting not in ("none", "min_snr"):
            raise ValueError(f"snr_gamma is of min_snr, not of loss_weighting={self.loss_weighting}; leave one out")
        return self

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _unquoted_no(cls, value: object) -> object:
        return "no" if value is False else value  # what YAML makes of an unquoted `no`

    def effective(self) -> dict[str, Any]:
        """`changed`, without what plays no part beside the other settings: what the digest of a training covers.

        Only what changes no bit of a result is left out. Two ways to say Min-SNR with gamma 5 (snr_gamma=5, and
        loss_weighting=min_snr) keep digests of their own: results of both were made before anybody asked.
        """
        idle = set(self._idle())
        return {name: value for name, value in self.changed().items() if name not in idle}

    def _idle(self) -> Iterator[str]:
        """Settings that another one has put out of play."""
        if self.loss_weighting != "p2":
            yield from ("p2_gamma", "p2_k")
        if not self.use_ema:
            yield from ("ema_inv_gamma", "ema_power", "ema_max_decay")


class PretrainSettings(TrainSettings):
    """The base from scratch: one model on all timesteps, no teacher."""

    total_steps: Positive = 10_000
    unet: UNetSettings = UNetSettings()
    scheduler: ScheduleSettings = ScheduleSettings()


class DecoupleSettings(TrainSettings):
    """N experts (Sec. 3.1, 3.2). `total_steps` is the whole budget, split evenly over the experts."""

    num_ranges: Positive = 4
    division: Literal[
        "uniform", "overlapping", "random_boundaries", "random_assignment", "log_snr", "gradient_similarity", "explicit"
    ] = Field("uniform", description="how [0,T) is cut into subsets; where ranges overlap, the nearest centre serves")
    overlap: Probability = Field(
        0.25, description="division=overlapping: how far a range reaches into each neighbour, as a share of its width"
    )
    division_seed: NonNegative = Field(0, description="of the divisions random_boundaries and random_assignment")
    edges: tuple[Positive, ...] | None = Field(
        None, description="division=explicit: the N - 1 timesteps at which a new range begins, ascending"
    )
    similarity_file: str | None = Field(
        None,
        description="division=gradient_similarity: a T x T or K x K matrix (.npz, .npy, .json); null: computed first",
    )
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
    projection_axes: Literal["channel", "spatial", "both"] = Field(
        "channel",
        description="spatial: a depthwise 3x3 convolution, identity at start, after the convolutions or blocks, which "
        "never folds; both: channel, then spatial",
    )
    init: Literal["pretrained", "ema", "partly_random", "random"] = Field(
        "pretrained",
        description="what a training starts from, equal for all of one seed; ema: the average beside the base, in "
        "<component>_ema; random: made anew by the seed",
    )
    init_random_share: Probability = Field(0.5, description="init=partly_random: share of layers made anew")
    multi_task: Literal["none", "uncertainty", "nash"] = Field(
        "none",
        description="how one model on all timesteps weighs the losses of timestep clusters: by uncertainty (Kendall "
        "et al. 2018) or NashMTL (Navon et al. 2022), as in ANT (Go et al. 2023); needs num_ranges=1",
    )
    multi_task_clusters: Positive = 5
    multi_task_division: Literal["uniform", "log_snr"] = Field("uniform", description="how the clusters are cut")
    multi_task_update_steps: Positive = Field(25, description="multi_task=nash: steps between its weights' renewals")
    lora_rank: Positive | None = Field(None, description="experts as LoRA of this rank; null: all weights are trained")
    lora_alpha: float | None = Field(None, gt=0.0, description="scale alpha / rank; null: the rank, so 1")
    lora_targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="names that layers end in, as to_q; null: the family's attention projections"
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
    def _division_is_said(self) -> Self:
        if (self.division == "explicit") != (self.edges is not None):
            raise ValueError("edges and division=explicit go together; give both, or neither")
        if self.edges is not None:
            if len(self.edges) != self.num_ranges - 1:
                raise ValueError(
                    f"edges: {len(self.edges)} inner ones for num_ranges={self.num_ranges}; N - 1 are needed"
                )
            if list(self.edges) != sorted(set(self.edges)):
                raise ValueError(f"edges: {list(self.edges)} must ascend")
        if self.multi_task != "none" and self.num_ranges != 1:
            raise ValueError(f"multi_task={self.multi_task} is for one model: num_ranges=1, not {self.num_ranges}")
        return self

    @model_validator(mode="after")
    def _tasks_are_weighed_in_one_process(self) -> Self:
        if self.multi_task != "none" and self.processes > 1:
            raise ValueError(
                f"multi_task={self.multi_task} weighs clusters by the whole batch: processes=1, not {self.processes}; "
                "gradient_accumulation_steps makes a batch as large"
            )
        if self.multi_task == "nash" and self.mixed_precision == "fp16":
            raise ValueError("multi_task=nash compares gradients, which fp16 scales; use mixed_precision bf16 or no")
        return self

    @model_validator(mode="after")
    def _axes_have_a_place(self) -> Self:
        if self.projection == "none" and self.projection_axes != "channel":
            raise ValueError(f"projection_axes={self.projection_axes}: projection=none has no place; residual or block")
        return self

    @model_validator(mode="after")
    def _lora_is_possible(self) -> Self:
        if self.lora_rank is None:
            if said := [name for name in ("lora_alpha", "lora_targets") if getattr(self, name) is not None]:
                raise ValueError(f"{said[0]} is of LoRA experts; set decouple.lora_rank, or leave it out")
            return self
        for name, only in (("projection", "none"), ("init", "pretrained"), ("teacher", "frozen")):
            if getattr(self, name) != only:
                found = getattr(self, name)
                raise ValueError(f"{name}={found}: LoRA leaves the base as it is; set decouple.{name}={only}")
        if self.teacher_dtype != "float32":
            raise ValueError(
                f"teacher_dtype={self.teacher_dtype}: the teacher of LoRA experts is the base itself, held and run in "
                "model.dtype; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_possible(self) -> Self:
        if self.teacher == "ema" and not self.use_ema:
            raise ValueError("teacher=ema needs use_ema=true")
        return self

    def effective(self) -> dict[str, Any]:
        """As for any training; a start that is partly random by a share of 0 or 1 is the one that it comes to."""
        whole: dict[float, str] = {0.0: "pretrained", 1.0: "random"}
        if self.init != "partly_random" or self.init_random_share not in whole:
            return super().effective()
        return self.model_copy(update={"init": whole[self.init_random_share]}).effective()

    def _idle(self) -> Iterator[str]:
        yield from super()._idle()
        if self.init != "partly_random":
            yield "init_random_share"
        if self.multi_task == "none":
            yield from ("multi_task_clusters", "multi_task_division")
        if self.multi_task != "nash":  # by uncertainty it only says how often weights are logged
            yield "multi_task_update_steps"
        if not self.consistency_weight:
            yield from ("teacher", "teacher_dtype")
        if self.teacher != "ema" or not self.consistency_weight:
            yield "teacher_update_steps"
        if self.global_prob in (0.0, 1.0):  # whoever tosses the coin, it falls on one side
            yield "timestep_sampling"

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
