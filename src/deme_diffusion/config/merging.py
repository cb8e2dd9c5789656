"""How the experts become one model: the method, the weights, and the search for them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deme_diffusion.config.base import Positive, Settings
from deme_diffusion.config.evaluation import SamplerSettings

MethodName = Literal[
    "task_arithmetic",
    "average",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "della",
    "slerp",
    "fisher",
    "tsv",
    "iso_c",
    "wudi",
]


class MethodOptions(Settings):
    """What some methods take (`merging/table.py` says which); null is the method's own default."""

    density: float | None = Field(
        None, gt=0.0, le=1.0, description="share of a task vector's entries that stay, above 0 to 1"
    )
    outliers: float | None = Field(
        None, ge=0.0, lt=1.0, description="share of the largest entries removed (Breadcrumbs), 0 to below 1"
    )
    epsilon: float | None = Field(
        None, ge=0.0, lt=1.0, description="spread of the drop probabilities by rank (DELLA), 0 to below 1"
    )
    trim: Literal["tensor", "global"] | None = Field(
        None, description="scope of TIES' trimming: tensor, each by itself, or global, the whole task vector at once"
    )
    rank: float | None = Field(
        None, gt=0.0, le=1.0, description="share of singular vectors kept (TSV), above 0 to 1; null is 1/N"
    )
    seed: int | None = Field(None, description="whole number that the random masks of DARE and DELLA are keyed by")


class MergeSettings(Settings):
    """How the experts become one model (Sec. 3.3); `method=none` serves the ensemble, `search=none` is uniform."""

    method: Literal[MethodName, "none"] = "task_arithmetic"
    options: MethodOptions = MethodOptions()
    weights: tuple[float, ...] | None = Field(None, description="given weights, one an expert; needs search=none")
    weighting: Literal["uniform", "snr"] = Field(
        "uniform",
        description="search=none and no weights: the method's own default, or, snr, w_i = the share of sum_t "
        "min(SNR(t), 5) in the timesteps that expert i serves",
    )
    weights_for: dict[str, tuple[float, ...]] = Field(
        {}, description="other weights for the parameters that match a pattern, as down_blocks.*; the last match wins"
    )
    keep: dict[str, Literal["base"] | int] = Field(
        {}, description="parameters taken unmerged from one model, by pattern: base, or an expert's index"
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="of the merged weights; null: the base's"
    )
    max_shard_size: str | None = Field(None, description="as 5GB; null: sharded like the base")
    lora_rank: Positive | None = Field(
        None, description="LoRA experts: rank of the merged LoRA, by SVD; null: the sum of ranks, which is exact"
    )
    fuse: bool = Field(False, description="LoRA experts: leave a whole pipeline, not a LoRA for the base")
    fisher_samples: Positive = Field(512, description="method fisher: images whose squared gradients are averaged")
    search: Literal["none", "least_squares", "grid", "gradient", "cma_es", "tpe"] = "least_squares"
    objective: Literal["fd", "loss", "relative_loss"] = Field(
        "fd",
        description="what the search lowers; least_squares and gradient take the loss for fd. Whichever it is, the "
        "answer is the best by FD among the finalists, w = 0, uniform and one-hot weights",
    )
    judge: Literal["fd", "kid"] = Field(
        "fd",
        description="what judges instead of FD throughout: kid, which has no bias, where images are not many more than "
        "the extractor's features",
    )
    ridge: float = Field(1e-3, ge=0.0, description="pull of least squares towards 0, relative to A's mean diagonal")
    scales: tuple[float, ...] = Field(
        (0.5, 1.0, 1.5), min_length=1, description="multiples of the least-squares weights to score"
    )
    gauss_newton_rounds: int = Field(0, ge=0, le=2, description="least squares again, linearised where it led")
    grid_values: tuple[float, ...] = Field(
        (0.0, 0.25, 0.5), min_length=1, description="values a weight takes in the grid, as far as bounds allow them"
    )
    granularity: Literal["model", "block", "layer"] = Field(
        "model", description="gradient: what has weights of its own"
    )
    gradient_steps: Positive = Field(
        10, description="gradient: steps of Adam; layers with weights of their own want more"
    )
    gradient_learning_rate: float = Field(
        0.1, gt=0.0, description="gradient: first step in a weight; falls as a cosine"
    )
    gradient_batch_size: Positive = Field(
        256, description="gradient: points of the fixed-noise loss that a step takes, over all ranges"
    )
    start: Literal["least_squares", "uniform", "zero"] = Field(
        "least_squares",
        description="where gradient, cma_es and tpe begin; least_squares of a method other than task_arithmetic: at "
        "its own weights",
    )
    sigma: float = Field(0.2, gt=0.0, description="cma_es: first standard deviation of a weight")
    bounds: tuple[float, float] | None = Field(
        None,
        description="of every weight that the search proposes; null: unbounded (w = 0 and one-hots are tried anyway)",
    )
    max_evaluations: Positive = Field(
        128,
        description="budget of a search, with the N + 1 of a least-squares start and all that FD judges; one that is "
        "known to need more is refused",
    )
    finalists: Positive = Field(3, description="best by an objective other than fd that FD then judges")
    num_images: Positive = Field(1000, description="images a candidate is scored on, with common seeds")
    sampler: SamplerSettings = SamplerSettings(num_inference_steps=20)

    @model_validator(mode="after")
    def _weights_or_search(self) -> Self:
        if self.weights is not None and self.search != "none":
            raise ValueError(f"weights are given, so search must be none, not {self.search}")
        return self

    @model_validator(mode="after")
    def _weighting_or_search(self) -> Self:
        if self.weighting == "snr" and (self.weights is not None or self.search != "none"):
            other = "with weights given" if self.weights is not None else f"with search={self.search}"
            raise ValueError(f"weighting=snr {other}: it needs search=none and no weights")
        if self.weighting == "snr" and self.method == "none":
            raise ValueError("weighting=snr: method=none merges nothing; use weighting=uniform")
        return self

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds: {list(self.bounds)}; the lower one comes first")
        return self
