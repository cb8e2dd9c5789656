"""A merged model by hand-picked weights as a pipeline on the disk, with its record and its card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of, write_text
from deme_diffusion.merging import record
from deme_diffusion.merging.checkpoints import locate
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.statistics import Statistics
from deme_diffusion.merging.write import write_model
from deme_diffusion.playground.session import Session
from deme_diffusion.playground.worker import Ticket
from deme_diffusion.report.card import model_card

PLAYED = "played"
"""The folder in a run's in which models are saved."""
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
"""Names that are no files' on Windows."""
SUFFIX = ".safetensors"
"""Of a name that `write_model` takes for a file's."""
FIRST = "by-hand"
_BY_HAND = "Its weights were chosen by hand in the playground of the run {run}: nothing was measured with them."
_UNWEIGHTED = "It was saved in the playground of the run {run}: nothing was measured with it there."


@dataclass(frozen=True)
class Saved:
    """Where a model lies, and the places of projections that stock diffusers loads it without."""

    folder: Path
    unfolded: list[str]


def check_name(name: str) -> str:
    """The name. Raises UserError for one that is a path, hidden, odd, a file's, or no name on other machines."""
    fits = NAME.fullmatch(name)
    if fits and not name.lower().endswith(SUFFIX) and not RESERVED.fullmatch(name):
        return name
    instead = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:64].strip("._-")
    while instead.lower().endswith(SUFFIX):
        instead = instead[: -len(SUFFIX)].strip("._-")
    hint = f"; did you mean {instead!r}?" if instead and not RESERVED.fullmatch(instead) else ""
    why = "1 to 64 letters, digits, dots, dashes or underscores are one"
    if fits:
        why = "that of a file, where a folder is written" if name.lower().endswith(SUFFIX) else "no name on Windows"
    raise UserError(f"name {name[:80]!r}: {why}{hint}")


def free_name(folder: Path, name: str = FIRST) -> str:
    """The first of NAME, NAME-2, NAME-3, ... that no model saved in a run's folder has."""
    stem = re.sub(r"-\d{1,6}$", "", name)[:57].rstrip("._-")
    names = (stem if i == 1 else f"{stem}-{i}" for i in count(1))
    return next(name for name in names if not (folder / PLAYED / name).exists())


class _Told:
    """An observer of a merge that also tells how far it is; it ends there where the model is not wanted any more."""

    def __init__(self, seen: Statistics, ticket: Ticket, total: int) -> None:
        self.seen, self.ticket, self.done, self.total = seen, ticket, 0, total

    def see(self, key: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        self.done += base.numel()
        self.ticket.tell("writing the model", min(self.done, self.total), self.total)
        self.seen.see(key, base, experts)


def save(session: Session, name: str, weights: MergeWeights, ticket: Ticket | None = None) -> Saved:
    """Write the merged pipeline into RUN/played/NAME. Raises UserError for a wrong name, or one that is taken.

    Nothing stays of one that is dropped by its ticket.
    """
    ticket = ticket or Ticket()
    out = session.run.folder / PLAYED / check_name(name)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; choose another name")
    merger, how, component = session.merger, session.how, session.stages.denoiser.component
    unfolded, seen = list(merger.unfolded(weights)), record.statistics_of(merger)
    entries = sum(prod(merger.base.shape(key)) for key in merger.base.keys())  # noqa: SIM118 - Weights is no mapping

    def beside(folder: Path) -> None:
        ticket.tell("writing the model", entries, entries)
        files = sorted(file.name for file in part_of(folder, component).glob("*.safetensors"))
        source = "chosen by hand (deme play)" if how.method.weighted else "the method takes none (deme play)"
        kept = record.record(merger, weights, source=source, shards=files, dtype=session.dtype, statistics=seen)
        record.write(folder, kept)
        write_text(folder / "README.md", _card(session, name, weights, unfolded, kept))
        ticket.tell("writing the model", entries, entries)

    write_model(
        merger,
        weights,
        locate(session.stages.folder(session.graph.base), component, what="base"),
        out,
        dtype=session.dtype,
        max_shard_size=how.max_shard_size,
        recipe={"method": how.method.name, "experts": [part.digest for part in session.experts], "source": "deme play"},
        observe=_Told(seen, ticket, entries),
        beside=beside,
    )
    return Saved(out, unfolded)


def _card(session: Session, name: str, weights: MergeWeights, unfolded: list[str], kept: dict[str, Any]) -> str:
    about: dict[str, Any] = {"base_model": session.graph.base.label, "merged_path": f"OWNER/{name}"}
    if unfolded:
        about["projection"] = {"component": session.stages.denoiser.component, "places": unfolded}
    weighted, several = session.how.method.weighted, len(session.recipe.seeds) > 1
    said = [(_BY_HAND if weighted else _UNWEIGHTED).format(run=session.recipe.name)]
    said += [f"Its experts are those of {session.training}."] if several else []
    return model_card(
        {
            "recipe": name,
            "description": " ".join(said),
            "weights": {"merged": list(weights.values)} if weighted else {},
            "division": session.graph.division.as_dict(),
            "merge": kept,
            **about,
        }
    )
