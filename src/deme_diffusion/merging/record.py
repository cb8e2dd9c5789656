"""merge.json: what was merged, how, and what came of it, beside the merged model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_diffusion.digests import hub_snapshot, known
from deme_diffusion.files import Record, write_json
from deme_diffusion.merging.statistics import Statistics, group_of
from deme_diffusion.models import projection
from deme_diffusion.provenance import provenance

if TYPE_CHECKING:
    import torch

    from deme_diffusion.merging.apply import Merger
    from deme_diffusion.merging.selection import MergeWeights
    from deme_diffusion.weights import Weights

NAME = "merge.json"
SMALL = 2**26
"""Bytes of a parent that is hashed without being asked: a tenth of a second."""


def path_of(out: Path) -> Path:
    """Where the record of a merged pipeline, component or single file lies."""
    return out / NAME if out.is_dir() else out.with_name(f"{out.stem}.{NAME}")


def statistics_of(merger: Merger) -> Statistics:
    """The Observer of a merge of these checkpoints."""
    keys = merger.base.keys()
    return Statistics(len(merger.experts), sum(prod(merger.base.shape(key)) for key in keys))


def record(
    merger: Merger,
    weights: MergeWeights,
    *,
    source: str,
    shards: Sequence[str],
    dtype: torch.dtype | None = None,
    statistics: Statistics | None = None,
    score: Mapping[str, Any] | None = None,
    full_hash: bool = False,
) -> Record:
    """What merge.json holds.

    `source`: whose the weights are (given, a default, a search). `shards`: names of the files written. `score`, of a
    search: objective, before (w = 0) and after. `full_hash` reads parents whose digest nothing vouches for; small
    ones are read in any case.
    """
    seen = None if statistics is None else statistics.as_dict()
    if seen is not None:
        for group, told in by_group(merger, weights).items():
            if group in seen["groups"]:
                seen["groups"][group]["weights"] = told
    return {
        **asked(merger, weights, source=source, dtype=dtype),
        "base": _parent(merger.base, full_hash),
        "experts": [_parent(expert, full_hash) for expert in merger.experts],
        **({"fisher": [_parent(reader, full_hash) for reader in merger.fisher]} if merger.fisher else {}),
        "shards": list(shards),
        "notes": list(merger.notes),
        "statistics": seen,
        "score": None if score is None else dict(score),
        "versions": provenance()["versions"],
    }


def asked(merger: Merger, weights: MergeWeights, *, source: str, dtype: torch.dtype | None = None) -> Record:
    """How the models are merged: known before they are."""
    return {
        "method": merger.row.name,
        "citation": merger.row.source,
        "options": options(merger),
        "weights": weights.as_dict(),
        "weights_source": source,
        "dtype": _dtype(merger, dtype),
    }


def options(merger: Merger) -> Record:
    """The method's options as they were used."""
    return {name: getattr(merger.options, name) for name in merger.row.options}


def write(out: Path, values: Record) -> None:
    """merge.json into the merged model's folder, or beside its file."""
    write_json(path_of(out), values)


def shards_in(folder: Path) -> list[str]:
    """Names of the weight files that a merge wrote into a component's folder."""
    return sorted(file.name for file in folder.glob("*.safetensors") if file.name != projection.FILE)


def by_group(merger: Merger, weights: MergeWeights) -> dict[str, Any]:
    """Layer group -> its weights; whose tensors they are, where all are kept; None where its parameters differ."""
    found: dict[str, list[Any]] = {}
    for key in merger.base.keys():  # noqa: SIM118 - Weights is no mapping
        kept = weights.kept(key)
        told = list(weights.at(key)) if kept is None else kept
        if told not in (several := found.setdefault(group_of(key), [])):
            several.append(told)
    return {group: told[0] if len(told) == 1 else None for group, told in found.items()}


def _parent(reader: Weights, full_hash: bool) -> Record:
    beside = reader.path / projection.FILE
    files = [*reader.files, *([beside] if beside.is_file() else [])]
    of = known(files, full_hash=full_hash or sum(file.stat().st_size for file in files) <= SMALL)
    told = {"path": str(reader.path.absolute()), "digest": of.digest, "digest_from": of.how, "bytes": of.bytes}
    return {**told, **hub_snapshot(reader.path)}


def _dtype(merger: Merger, dtype: torch.dtype | None) -> str:
    """Of the merged weights: one name, or several by commas."""
    keys = merger.base.keys()
    kinds: Iterable[torch.dtype] = (merger.dtype_of(key, dtype) for key in keys)
    return ", ".join(sorted({str(kind).removeprefix("torch.") for kind in kinds if kind.is_floating_point}))
