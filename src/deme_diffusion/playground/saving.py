"""A merged model by hand-picked weights as a pipeline on the disk, with its record and its card."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of, write_text
from deme_diffusion.merging import record
from deme_diffusion.merging.checkpoints import locate
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.write import write_model
from deme_diffusion.playground.session import Session
from deme_diffusion.report.card import model_card

PLAYED = "played"
"""The folder in a run's in which models are saved."""
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_BY_HAND = "Its weights were chosen by hand in the playground of the run {run}: nothing was measured with them."


@dataclass(frozen=True)
class Saved:
    """Where a model lies, and the places of projections that stock diffusers loads it without."""

    folder: Path
    unfolded: list[str]


def check_name(name: str) -> str:
    """The name. Raises UserError for one that is a path, hidden, or odd."""
    if NAME.fullmatch(name):
        return name
    instead = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:64].strip("._-")
    hint = f"; did you mean {instead!r}?" if instead else ""
    raise UserError(f"name {name[:80]!r}: 1 to 64 letters, digits, dots, dashes or underscores are one{hint}")


def save(session: Session, name: str, weights: MergeWeights) -> Saved:
    """Write the merged pipeline into RUN/played/NAME. Raises UserError for a wrong name, or one that is taken."""
    out = session.run.folder / PLAYED / check_name(name)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; choose another name")
    merger, how, component = session.merger, session.how, session.stages.denoiser.component
    unfolded, seen = list(merger.unfolded(weights)), record.statistics_of(merger)

    def beside(folder: Path) -> None:
        files = sorted(file.name for file in part_of(folder, component).glob("*.safetensors"))
        source = "chosen by hand (deme play)"
        kept = record.record(merger, weights, source=source, shards=files, dtype=session.dtype, statistics=seen)
        record.write(folder, kept)
        write_text(folder / "README.md", _card(session, out, weights, unfolded, kept))

    write_model(
        merger,
        weights,
        locate(session.stages.folder(session.graph.base), component, what="base"),
        out,
        dtype=session.dtype,
        max_shard_size=how.max_shard_size,
        recipe={"method": how.method.name, "experts": [part.digest for part in session.experts], "source": "deme play"},
        observe=seen,
        beside=beside,
    )
    return Saved(out, unfolded)


def _card(session: Session, out: Path, weights: MergeWeights, unfolded: list[str], kept: dict[str, Any]) -> str:
    about: dict[str, Any] = {"base_model": session.graph.base.label, "merged_path": str(out)}
    if unfolded:
        about["projection"] = {"component": session.stages.denoiser.component, "places": unfolded}
    division = session.graph.division.as_dict()
    return model_card(
        {
            "recipe": out.name,
            "description": _BY_HAND.format(run=session.recipe.name),
            "weights": {"merged": list(weights.values)},
            "division": division,
            "merge": kept,
            **about,
        }
    )
