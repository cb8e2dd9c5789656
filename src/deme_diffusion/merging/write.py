"""The merged model on disk: a pipeline, a component or a file as the base is, the recipe in the files' metadata."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.errors import UserError
from deme_diffusion.files import building, explained, require_space, write_json, write_text
from deme_diffusion.merging.apply import Given, Merger
from deme_diffusion.merging.checkpoints import MODEL_INDEX, Place
from deme_diffusion.merging.remarks import note_buffers
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.stream import Observer, stream
from deme_diffusion.merging.unmerged import copied_bytes, copy_beside, copy_parts
from deme_diffusion.models import projection
from deme_diffusion.weight_files import SHARD, read_json
from deme_diffusion.weights import WEIGHTS_NAME, Header, State

log = logging.getLogger(__name__)
METADATA_KEY = "deme_merge"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
_VARIANT = re.compile(
    r"(?<=^diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.(?!safetensors)[\w-]+?(?=-\d{5}-of-|\.safetensors)"
)


def nothing(folder: Path) -> None:
    """Put no file beside the model."""


def write_model(
    merger: Merger,
    weights: Given,
    base: Place,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int | None = None,
    recipe: Mapping[str, Any] | None = None,
    observe: Observer | None = None,
    beside: Callable[[Path], None] = nothing,
    link: bool = False,
) -> None:
    """Write the merged model as what the base is: its whole pipeline, a component's folder, or a file.

    All is written under a hidden name, to which `beside` may add files, and renamed at the end. `out` must not exist,
    or be an empty folder. Where the base is a file, `out` may be one (.safetensors): what `beside` adds is then put
    next to it, its name after the file's. `link` shares the other parts' big files with the base by hard links, whose
    bytes are then the base's too. Raises UserError for a target or weights that cannot be, MachineError for a disk that
    is full or closed, and while another process writes there.
    """
    weights = merger.check(weights)
    _check_target(merger, base, out, max_shard_size)
    real = Path(os.path.realpath(out))  # a link to an empty folder stays one
    with building(real, chosen=base.weights.name if out.suffix == ".safetensors" else None) as folder:
        write_into(
            merger,
            weights,
            base,
            folder,
            dtype=dtype,
            max_shard_size=max_shard_size,
            recipe=recipe,
            observe=observe,
            link=link,
        )
        beside(folder)


def planned(
    merger: Merger,
    weights: Given,
    base: Place,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int | None = None,
    link: bool = False,
) -> dict[str, int]:
    """Name -> bytes of tensors of the weight files that `write_model` would write; it raises what that would first."""
    weights = merger.check(weights)
    _check_target(merger, base, out, max_shard_size)
    note_buffers(merger, weights)
    sizes = _sizes(merger, dtype, max_shard_size)
    _require_space(base, out, sizes, link)
    return sizes


def _sizes(merger: Merger, dtype: torch.dtype | None, max_shard_size: str | int | None) -> dict[str, int]:
    return {
        name: sum(merger.dtype_of(key, dtype).itemsize * prod(merger.base.shape(key)) for key in keys)
        for name, keys in _shards(merger, dtype, max_shard_size).items()
    }


def _require_space(base: Place, out: Path, sizes: Mapping[str, int], link: bool) -> None:
    """Raises MachineError where the disk has no room for the merged weights and the parts that are copied."""
    beside = copied_bytes(base.pipeline, str(base.component), out, link=link) if base.pipeline else 0
    require_space(out, sum(sizes.values()) + beside)


def write_into(
    merger: Merger,
    weights: Given,
    base: Place,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int | None = None,
    recipe: Mapping[str, Any] | None = None,
    observe: Observer | None = None,
    link: bool = False,
) -> None:
    """`write_model` into a folder that is a temporary one already: nothing is hidden, nothing renamed."""
    component = folder
    if base.pipeline is not None:
        assert base.component is not None, "a pipeline's weights are a component's"
        _require_space(base, folder, _sizes(merger, dtype, max_shard_size), link)
        component = folder / base.component
        copy_parts(base.pipeline, base.component, folder, link=link)
    write_merged(merger, weights, component, dtype=dtype, max_shard_size=max_shard_size, recipe=recipe, observe=observe)


def write_merged(
    merger: Merger,
    weights: Given,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int | None = None,
    recipe: Mapping[str, Any] | None = None,
    observe: Observer | None = None,
) -> None:
    """Stream the merged component into the folder `out`, sharded like the base unless `max_shard_size` says otherwise.

    Projections that fold into no weight are left beside the weights, and logged. Raises MachineError where the disk
    has no room.
    """
    weights = merger.check(weights)
    note_buffers(merger, weights)
    shards = _shards(merger, dtype, max_shard_size)
    files = {
        out / name: {key: (merger.dtype_of(key, dtype), merger.base.shape(key)) for key in keys}
        for name, keys in shards.items()
    }
    require_space(out, sum(map(_bytes, files.values())))
    metadata = {METADATA_KEY: json.dumps({"weights": _plain(weights), **(recipe or {})}, sort_keys=True)}
    rest = merger.unfolded(weights)
    with explained("write", out):
        out.mkdir(parents=True, exist_ok=True)
        stream(merger, weights, files, metadata, dtype=dtype, observe=observe)
    if len(files) > 1 or SHARD.search(next(iter(shards))):
        size = sum(map(_bytes, files.values()))
        owner = {key: name for name, keys in shards.items() for key in keys}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(owner.items()))}
        write_json(out / _index_name(next(iter(shards))), index)
    if merger.base.path.is_dir():
        copy_beside(merger.base.path, out)
        if dtype is not None:
            _say_dtype(out / "config.json", dtype)
    _write_unfolded(rest, out, metadata)


def _say_dtype(config: Path, dtype: torch.dtype) -> None:
    """The dtype in a config that says one, as those of transformers do: models are loaded in what it says."""
    said = read_json(config) if config.is_file() else {}
    name = str(dtype).removeprefix("torch.")
    old = {key: said[key] for key in ("dtype", "torch_dtype") if isinstance(said.get(key), str)}
    if any(value.removeprefix("torch.") != name for value in old.values()):
        write_text(config, json.dumps({**said, **dict.fromkeys(old, name)}, indent=2) + "\n")


def _plain(weights: MergeWeights) -> Any:
    """As in the metadata: a list, where every parameter has the same ones."""
    return weights.as_dict() if weights.rules or weights.keep else list(weights.values)


def _write_unfolded(rest: State, out: Path, metadata: Mapping[str, str]) -> None:
    if not rest:
        (out / projection.FILE).unlink(missing_ok=True)  # of a merge that was here before
        return
    projection.save(out, rest, metadata)
    log.warning(
        "%s, beside the weights: the projections after %s fold into no weight; stock diffusers loads the model without "
        "them, deme_diffusion.attach_projection adds them",
        projection.FILE,
        ", ".join(rest),
    )


# -- shards ----------------------------------------------------------------------------------------


def _shards(merger: Merger, dtype: torch.dtype | None, max_shard_size: str | int | None) -> dict[str, list[str]]:
    """File name -> keys."""
    layout = merger.base.layout()
    changed = any(merger.dtype_of(key, dtype) != merger.base.dtype(key) for keys in layout.values() for key in keys)
    if changed and merger.base.path.is_dir():
        layout = {_VARIANT.sub(r"\1", name): keys for name, keys in layout.items()}  # .fp16 would be wrong
    if max_shard_size is None:
        return layout
    limit, groups, room = shard_bytes(max_shard_size), list[list[str]](), 0
    for key in (key for keys in layout.values() for key in keys):
        size = merger.dtype_of(key, dtype).itemsize * prod(merger.base.shape(key))
        if not groups or size > room:
            groups, room = [*groups, []], limit
        groups[-1].append(key)
        room -= size
    name = SHARD.sub("", next(iter(layout)))
    if len(groups) < 2:
        return {name: [key for group in groups for key in group]}
    stem = name.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups, start=1)}


def shard_bytes(size: str | int) -> int:
    """Bytes of a size as 5GB, 500MB or 2GiB; an int is bytes. Raises UserError otherwise, also for a bare '5'."""
    found = _SIZE.fullmatch(str(size))
    number = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ") if found else 0
    if number < 1:
        raise UserError(f"max_shard_size: {size!r} is no size; give one like 5GB or 500MB")
    if isinstance(size, str) and found and not found[2] and number < 1e6:  # else a file a tensor would be written
        raise UserError(f"max_shard_size: {size!r} is {int(number)} bytes; did you mean '{found[1]}GB'?")
    return int(number)


def _index_name(shard: str) -> str:
    """As diffusers names it, a variant before the last dot."""
    whole, stem = SHARD.sub("", shard), WEIGHTS_NAME.partition(".")[0]
    variant = whole.removeprefix(f"{stem}.").removesuffix(".safetensors") if whole.startswith(f"{stem}.") else ""
    return f"{whole}.index.json" if variant in ("", "safetensors") else f"{WEIGHTS_NAME}.index.{variant}.json"


def _bytes(header: Header) -> int:
    return sum(dtype.itemsize * prod(shape) for dtype, shape in header.values())


# -- the target, and what lies beside the weights --------------------------------------------------


def _check_target(merger: Merger, base: Place, out: Path, max_shard_size: str | int | None) -> None:
    """Raises UserError where the merged model cannot stand."""
    if out.suffix == ".safetensors" and not base.is_file:
        raise UserError(f"{out}: a file, but the base is a folder; give a folder, or a .safetensors file as base")
    if out.suffix == ".safetensors" and max_shard_size is not None:
        raise UserError(f"{out}: one file, which max_shard_size would split; give a folder")
    if out.suffix != ".safetensors" and out.is_dir() and not any(out.iterdir()):
        pass
    elif out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; give a name that is free, or an empty folder")
    for name in ("merge.json", projection.FILE) if out.suffix == ".safetensors" else ():
        if (taken := out.with_name(f"{out.stem}.{name}")).exists() or taken.is_symlink():
            raise UserError(f"{taken}: exists already, and would go with {out.name}; give {out.name} another name")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise UserError(f"{out}: {above} is a file, not a folder")
    within = set(out.resolve().parents)
    for parent in (base.given, base.weights, *(own.path for own in merger.experts)):
        whole = parent.parent if (parent.parent / MODEL_INDEX).is_file() else parent
        if whole.is_dir() and whole.resolve() in within:
            raise UserError(f"{out}: lies inside {whole}, which is merged from; give a folder elsewhere")
