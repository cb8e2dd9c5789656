"""Which files hold a component's weights: diffusers' names, shards with their index, variants. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

from deme_diffusion.errors import UserError

WEIGHTS_NAME, TRANSFORMERS_NAME = "diffusion_pytorch_model.safetensors", "model.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
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


def pickled(file: Path) -> UserError:
    """What is said of a checkpoint that is a pickle."""
    return UserError(
        f"{file}: a pickled checkpoint, which is never loaded; `deme convert {file} --like BASE --out DIR` "
        "makes safetensors of it"
    )
