"""What the functions of the Python interface give back. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deme_diffusion.report.tables import Row
    from deme_diffusion.report.verdict import Verdict


@dataclass(frozen=True)
class Result:
    """What a run leaves: its folder, the merged pipeline's folder, the evidence.

    With several seeds `merged` is the first one's; with merge.method=none it is None.
    """

    folder: Path
    merged: Path | None
    table: list[Row]
    verdict: Verdict


@dataclass(frozen=True)
class Expert:
    """One trained expert: its training seed, its index, the timesteps it was trained on, and its folder."""

    seed: int
    index: int
    timesteps: str
    folder: Path


@dataclass(frozen=True)
class Merged:
    """One merged pipeline, which stock diffusers loads: its training seed, folder, a weight for each expert, and
    where the weights come from (a search's winning proposal, or the recipe).

    `rules`: pattern of parameter names -> other weights, where parts of the model have their own.
    """

    seed: int
    folder: Path
    weights: tuple[float, ...]
    source: str
    rules: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class MergedCheckpoint:
    """One merged model, as its base: a pipeline, a component folder or a file; `weights` one an expert.

    `notes` is what a user should know (an expert equals the base, dtypes differ), `record` what merge.json beside the
    model holds: method, weights, parents with digests, statistics of the task vectors by layer group.
    """

    path: Path
    weights: tuple[float, ...]
    notes: tuple[str, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One picture: which of the paper's figures it is of, what it says, and its files; `data` is what it shows."""

    kind: str
    name: str
    title: str
    caption: str
    alt: str
    svg: Path
    png: Path
    data: tuple[Path, ...]

    @classmethod
    def of(cls, picture: Mapping[str, Any], folder: Path) -> Figure:
        """A picture as a run folder's index has it."""
        told = {key: picture[key] for key in ("kind", "name", "title", "caption", "alt")}
        data = tuple(folder / file for file in picture["data"])
        return cls(**told, svg=folder / picture["svg"], png=folder / picture["png"], data=data)
