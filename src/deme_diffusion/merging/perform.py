"""A merge of checkpoints that was asked for: opened and checked, then told in advance, or written with its record."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from deme_diffusion.digests import known
from deme_diffusion.errors import UserError
from deme_diffusion.files import Record, building, part_of, require_space, write_text
from deme_diffusion.lora_files import LORA_NAME, find_lora
from deme_diffusion.merging import record
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.checkpoints import Place, locate
from deme_diffusion.merging.estimate import spectral_cost
from deme_diffusion.merging.lora import loras_of
from deme_diffusion.merging.lora_write import readme, write_lora
from deme_diffusion.merging.methods.spectral import estimated_seconds
from deme_diffusion.merging.parents import of_pipelines
from deme_diffusion.merging.request import Request
from deme_diffusion.merging.write import planned as planned_files
from deme_diffusion.merging.write import write_model
from deme_diffusion.weights import Weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A request whose checkpoints were found, opened and checked."""

    request: Request
    merger: Merger
    base: Place
    dtype: torch.dtype | None


@contextmanager
def opened(request: Request) -> Iterator[Opened]:
    """The checkpoints of a request, open within the block. Raises UserError for any that do not fit together."""
    base = locate(request.base, request.component, what="base")
    if request.component and base.component is None:
        kind = "one file" if base.is_file else "a component's folder"
        raise UserError(f"component {request.component}: base {base.given} is {kind}, no pipeline; leave it out")
    experts = [
        Place(path, path) if find_lora(path) else locate(path, base.component, what="expert")
        for path in request.experts
    ]
    dtype = None if request.dtype is None else getattr(torch, request.dtype)
    paths = [place.weights for place in experts]
    if request.full_hash and any(map(find_lora, request.experts)):
        with Weights(base.weights) as whole:
            known(whole.files, full_hash=True)  # remembered: LoRAs are compared with it as they are opened
    with Merger(base.weights, paths, request.method.name, request.options, request.fisher) as merger:
        merger.notes += [note for place in experts for note in of_pipelines(base, place)]
        merger.notes += _same_twice(paths)
        yield Opened(request, merger, base, dtype)


def _same_twice(paths: Sequence[Path]) -> Iterator[str]:
    """What to say of experts that are one and the same."""
    real = [path.resolve() for path in paths]
    for i, path in enumerate(real):
        if path in real[:i]:
            yield f"{paths[i]}: expert {i} is expert {real.index(path)} again; its task vector counts twice"


def planned(request: Request) -> Record:
    """What a merge would do, after every check that comes before its first byte. Raises UserError, MachineError."""
    with opened(request) as here:
        merger = here.merger
        if request.lora:
            return _planned_lora(here)
        files = planned_files(
            merger,
            request.weights,
            here.base,
            request.out,
            dtype=here.dtype,
            max_shard_size=request.max_shard_size,
            link=request.link,
        )
        return {
            **record.asked(merger, request.weights, source=request.source, dtype=here.dtype),
            "out": str(request.out),
            "component": here.base.component,
            "shards": {request.out.name: sum(files.values())} if _is_file(request) else files,
            "bytes": sum(files.values()),
            "estimate": _estimate(here),
            "notes": list(merger.notes),
        }


def performed(request: Request) -> Record:
    """Write the merged model, and return its record (merge.json). Raises UserError, MachineError."""
    with opened(request) as here:
        _warn(here.merger.notes)
        if estimate := _estimate(here):
            log.info("%s: %s", request.method.name, told_estimate(estimate))
        if request.lora:
            return _performed_lora(here)
        merger, seen, told = here.merger, record.statistics_of(here.merger), Record()
        before = len(merger.notes)  # what a merge finds out comes after

        def beside(folder: Path) -> None:
            weights = folder if here.base.pipeline is None else part_of(folder, str(here.base.component))
            told.update(
                record.record(
                    merger,
                    request.weights,
                    source=request.source,
                    shards=[request.out.name] if _is_file(request) else record.shards_in(weights),
                    dtype=here.dtype,
                    statistics=seen,
                    full_hash=request.full_hash,
                )
            )
            record.write(folder, told)

        write_model(
            merger,
            request.weights,
            here.base,
            request.out,
            dtype=here.dtype,
            max_shard_size=request.max_shard_size,
            recipe={"method": request.method.name, "options": record.options(merger)},
            observe=seen,
            beside=beside,
            link=request.link,
        )
        _warn(merger.notes[before:])
    return told


def _planned_lora(here: Opened) -> Record:
    """What a merge of LoRAs into one would do."""
    request, merger = here.request, here.merger
    weights = merger.check(request.weights)
    ranks = [max(own.rank for own in reader.lora.layers.values()) for reader in loras_of(merger)]
    rank, names = request.lora_rank or sum(ranks), {n for reader in loras_of(merger) for n in reader.lora.layers}
    sizes = [merger.base.shape(f"{name}.weight") for name in names]
    size = (here.dtype or torch.float32).itemsize * sum(rank * (shape[0] + prod(shape[1:])) for shape in sizes)
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise UserError(f"{request.out}: exists already; give a name that is free, or an empty folder")
    require_space(request.out, size)
    return {
        **record.asked(merger, weights, source=request.source, dtype=here.dtype),
        "dtype": request.dtype or "float32",
        "out": str(request.out),
        "component": loras_of(merger)[0].lora.component,
        "shards": {LORA_NAME: size},
        "bytes": size,
        "estimate": None,
        "lora": {"layers": len(names), "rank": rank},
        "notes": list(merger.notes),
    }


def _performed_lora(here: Opened) -> Record:
    """Write LoRAs merged into one, with a record and how it is loaded."""
    request, merger = here.request, here.merger
    _planned_lora(here)
    with building(Path(os.path.realpath(request.out))) as folder:
        told = write_lora(
            merger,
            request.weights,
            folder,
            source=request.source,
            rank=request.lora_rank,
            dtype=here.dtype,
            recipe={"options": record.options(merger)},
            full_hash=request.full_hash,
        )
        record.write(folder, told)
        write_text(folder / "README.md", readme(told, str(request.base.absolute())))
    return told


def _is_file(request: Request) -> bool:
    return request.out.suffix == ".safetensors"


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        log.warning("%s", note)


def _estimate(here: Opened) -> Record | None:
    """Flops and peak bytes of a spectral method; None for the others."""
    merger = here.merger
    if not merger.row.spectral:
        return None
    shapes = [merger.base.shape(key) for key in merger.base.keys()]  # noqa: SIM118 - Weights is no mapping
    asked = shapes, len(merger.experts), merger.row.name, merger.options.rank
    flops, held = spectral_cost(*asked)
    matrices = sum(len(shape) > 1 and prod(shape) > 0 for shape in shapes)
    return {"matrices": matrices, "flops": flops, "seconds": estimated_seconds(*asked), "bytes": held}


def told_estimate(estimate: Record) -> str:
    """The estimate in words."""
    seconds, held = estimate["seconds"], estimate["bytes"]
    time = f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    memory = f"{held / 1e9:.1f} GB" if held >= 1e8 else f"{held / 1e6:.1f} MB"
    return f"{estimate['matrices']} matrices to decompose: about {time} here, and {memory} of memory for the largest"
