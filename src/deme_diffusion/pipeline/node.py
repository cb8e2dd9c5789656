"""The vertices of the stage graph: a stage with its key and inputs, and a model as it is served. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deme_diffusion.artefacts import Key
from deme_diffusion.pipeline.inputs import Input

METRICS, COSTS = "metrics.json", "cost.json"
StageName = Literal["pretrain", "extractor", "decouple", "search", "merge", "sample", "features", "evaluate", "cost"]

VERSIONS: dict[StageName, int] = {
    "pretrain": 1,
    "extractor": 1,
    "decouple": 1,
    "search": 1,
    "merge": 1,
    "sample": 1,
    "features": 1,
    "evaluate": 2,  # precision and recall: balls around distinct images only
    "cost": 2,
}
"""Raised when a stage's code or defaults change results, so that old artefacts are not taken for new ones."""


@dataclass(frozen=True, eq=False)
class Node:
    """One stage with its inputs. `arguments` are for the stage's function; the key says all that shapes the result."""

    key: Key
    label: str
    parents: Mapping[str, Node | Input]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    images: int = 0
    exclusive: bool = False

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.key.stage

    @property
    def digest(self) -> str:
        """The key's digest."""
        return self.key.digest


@dataclass(frozen=True, eq=False)
class Served:
    """A row's model: one component, or the experts of a routed ensemble."""

    name: str
    parts: tuple[Node | Input, ...]
    ensemble: bool = False
