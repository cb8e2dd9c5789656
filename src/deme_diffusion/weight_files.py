"""Which files hold a component's weights: diffusers' names, shards with their index, variants. No torch."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deme_diffusion.errors import UserError

WEIGHTS_NAME, TRANSFORMERS_NAME = "diffusion_pytorch_model.safetensors", "model.safetensors"
PROJECTIONS, PROJECTION_KEY = "projection.safetensors", "projection."
"""The file of projections beside a component's weights; what stands before a projection's name where it is merged."""
SPATIAL = "|spatial"
"""What follows a place in the name of its spatial projection: `mid_block` is D there, `mid_block|spatial` is D_s."""
AVERAGED = "_ema"
"""What follows a component's name in the folder of its average, where a pipeline has one: diffusers' own `unet_ema`."""
NO_BASE = (
    "a base must be whole without projections; take the model that was merged, or one made with decouple.projection "
    "none, or residual with projection_axes channel"
)
"""Why a model with projections beside its weights is finetuned and merged no further."""
FISHER_METADATA = "deme_fisher"
"""Key of a safetensors file's metadata: what a file of Fisher information is about."""
SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.|$)")
"""In the name of a shard: which one it is of how many."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VARIANT = re.compile(r"diffusion_pytorch_model\.(?!safetensors)[\w-]+\.safetensors")
_VARIANT_INDEX = re.compile(r"diffusion_pytorch_model\.(safetensors\.index\.[\w-]+|[\w-]+\.safetensors\.index)\.json")


def weight_files(folder: Path, *, others: bool = True) -> list[Path]:
    """The weight files of a component folder: diffusers' name or its shards; else, with `others`, a variant's.

    A variant (`diffusion_pytorch_model.fp16.safetensors`) counts where it is the only one; `others` takes the names of
    transformers (`model.safetensors`) as well. Raises UserError for a missing folder, shard, or a pickle instead.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; a diffusers component folder is expected")
    index = index_of(folder, others=others)
    names = sorted(set(weight_map(index).values())) if index else [_single(folder, others)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        if pickles := sorted(path for path in folder.iterdir() if path.suffix in PICKLES):
            raise pickled(pickles[0])
        raise UserError(f"{folder / missing[0]}: missing ({len(missing)} of {len(names)} weight files)")
    return [folder / name for name in names]


def index_of(folder: Path, *, others: bool = True) -> Path | None:
    """The index of the shards, where the weights of a component folder are sharded."""
    for name in (WEIGHTS_NAME, TRANSFORMERS_NAME) if others else (WEIGHTS_NAME,):
        if (folder / f"{name}.index.json").is_file():
            return folder / f"{name}.index.json"
        if (folder / name).is_file():
            return None
    return _only(folder, _VARIANT_INDEX) if others else None


def _single(folder: Path, others: bool) -> str:
    for name in (WEIGHTS_NAME, TRANSFORMERS_NAME) if others else ():
        if (folder / name).is_file():
            return name
    variant = _only(folder, _VARIANT) if others else None
    return variant.name if variant else WEIGHTS_NAME


def _only(folder: Path, pattern: re.Pattern[str]) -> Path | None:
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: weights of several variants ({names}) and no default; give one file of them")
    return found[0] if found else None


def weight_map(index: Path) -> dict[str, str]:
    """Stored key -> shard."""
    try:
        found = {str(key): str(name) for key, name in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        found = {}
    if not found:
        raise UserError(f"{index}: not an index of safetensors shards; fetch or make it again")
    return found


def checked_parts(index: Path, names: Iterable[str]) -> list[str]:
    """The names of a pipeline's parts, as its index has them, which become folders in what is written.

    Raises UserError for one that could lead out of there: an index is a stranger's text.
    """
    checked = list(names)
    for name in checked:
        if not _PART.fullmatch(name):
            raise UserError(f"{index}: {name!r} is no name of a part (letters, digits, _ . - and no dot first)")
    return checked


def pickled(file: Path) -> UserError:
    """What is said of a checkpoint that is a pickle."""
    return UserError(
        f"{file}: a pickled checkpoint, which is never loaded; `deme convert {shlex.quote(str(file))} --like BASE "
        "--out DIR` makes safetensors of it"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A mapping in a JSON file. Raises UserError for anything else."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{file}: no readable JSON mapping")
    return values
