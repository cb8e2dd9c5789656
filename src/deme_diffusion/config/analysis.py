"""Which pictures of a run are drawn, and how finely."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deme_diffusion.config.base import Positive, Settings
from deme_diffusion.config.evaluation import SamplerSettings

FigureName = Literal["similarity", "activations", "landscape", "plane", "vectors", "trajectory"]
FIGURES: tuple[FigureName, ...] = ("similarity", "activations", "landscape", "plane", "vectors", "trajectory")
"""The paper's six pictures (METHOD.md section 6), in the order of the page."""
RADII = {"random": 0.25, "task_vectors": 1.5}
"""Of a landscape, where the settings name none: a quarter of each filter's length; the task vectors and beyond."""


class AnalyzeSettings(Settings):
    """The paper's figures, of the first training seed. Losses are on fixed noise and the same points for every cell."""

    figures: tuple[FigureName, ...] = Field(FIGURES, description="drawn at the end of a run; none where it is empty")
    seed: int = 0
    split: Literal["train", "search"] = Field(
        "train", description="images of losses and activations; the paper's: train"
    )
    num_images: int = Field(256, ge=2, description="images of the split that losses and activations are taken on")
    draws: Positive = Field(1, description="timesteps of each range that every image is drawn at")
    similarity_within: Literal["whole", "ranges"] | tuple[tuple[int, int], ...] = Field(
        "ranges",
        description="where gradients are compared: [0,T) alone, also in each expert's range, or [[lo, hi], ...]",
    )
    directions: Literal["random", "task_vectors"] = Field(
        "random", description="of the landscape: filter-normalised random ones, or the task vectors' leading ones"
    )
    landscape_points: int = Field(11, ge=3, description="points of each axis of the landscape; odd, so that 0 is one")
    landscape_radius: float | None = Field(
        None, gt=0.0, description="the axes go from -radius to radius; null: 0.25, or 1.5 along task vectors"
    )
    plane_points: Positive = Field(15, description="points of each axis of the plane of two task vectors")
    plane_experts: tuple[int, int] | None = Field(None, description="whose task vectors span it; null: first and last")
    trajectory_images: Positive = Field(64, description="images of the sample grids; the first one's way is shown")
    sampler: SamplerSettings | None = Field(None, description="of grids and trajectory; null: evaluate.samplers[0]")
    experts: tuple[str, ...] | None = Field(
        None, description="folders of experts trained elsewhere, in the order of the ranges; null: the recipe's own"
    )
    merged: str | None = Field(None, description="folder of a model merged elsewhere; with experts, null is none")

    @model_validator(mode="after")
    def _grids_hold_the_base(self) -> Self:
        if self.landscape_points % 2 == 0:
            raise ValueError(f"landscape_points: {self.landscape_points} is even; take {self.landscape_points + 1}")
        if self.plane_experts is not None and len(set(self.plane_experts)) < 2:
            raise ValueError(f"plane_experts: {list(self.plane_experts)} names one expert twice; two span a plane")
        if self.plane_points < 2:
            raise ValueError("plane_points: 1 is no axis; take 2 or more, 15 for steps of 0.1")
        return self
