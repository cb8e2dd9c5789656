"""What a plan's ablations mean for a recipe: arms, each the recipe with one stated change, or the reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deme_diffusion.ablate.plan import Ablation

Status = Literal["ready", "same_as_baseline", "not_executable"]


@dataclass(frozen=True)
class Arm:
    """One change to the recipe. `replacement` is the plan's text (None for REMOVE, and where ADD names no other).

    `change` is config path -> value; `variant` tells arms of one text apart ("random boundaries"); `score` in [0, 1] is
    how well the text fits what it was taken for; `nearest` the parts or replacements that came closest.
    """

    replacement: str | None
    status: Status
    change: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    reason: str = ""
    nearest: tuple[str, ...] = ()
    score: float = 0.0

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.variant or self.replacement or "removed"


@dataclass(frozen=True)
class Metric:
    """A metric as the plan names it, the table's metrics it stands for (`FD`, `latency (ms)`), or why there is none."""

    asked: str
    columns: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Resolved:
    """An ablation with the part it speaks of (a name of the parts table, None where none fits) and its arms."""

    ablation: Ablation
    part: str | None
    metrics: tuple[Metric, ...]
    arms: tuple[Arm, ...]
    score: float = 0.0
