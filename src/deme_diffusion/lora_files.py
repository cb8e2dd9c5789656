"""Where a LoRA lies on disk, and what its header says; `lora` reads and writes the factors. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deme_diffusion.errors import UserError

LORA_NAME = "pytorch_lora_weights.safetensors"
"""The name that stock diffusers' `load_lora_weights(folder)` looks for."""
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What peft's own `save_pretrained` leaves."""
ADAPTER_KEY = "lora_adapter_metadata"
"""Key of a safetensors file's metadata under which diffusers keeps the arguments of peft's `LoraConfig`."""
BASE_KEY = "deme_base"
"""Key of the metadata that says which model a LoRA of ours is for: sha256, dtype and number of its weight files."""
_ADAPTER = re.compile(r"(.*[._])?(lora(_\w+?)?|hada_w\d_[ab]|lokr_w\d(_[ab])?)([._].*)?", re.IGNORECASE)


def find_lora(path: Path) -> Path | None:
    """The file of a LoRA, where that is what a file or folder holds; None where it holds something else.

    Raises UserError for a folder with several of which none has a name that diffusers or peft gives, and for one with
    a whole model beside.
    """
    if path.is_file():
        return path if path.suffix == ".safetensors" and _adapts(path) else None
    whole = next((name for name in ("model_index.json", "config.json") if (path / name).is_file()), None)
    for name in (LORA_NAME, PEFT_NAME):
        if (path / name).is_file():
            if whole:
                model = "its component's folder" if whole == "model_index.json" else "its weight file"
                raise UserError(
                    f"{path}: a LoRA ({name}) beside a whole model ({whole}); give {path / name}, or {model}"
                )
            return path / name
    if whole or not path.is_dir():
        return None
    found = [file for file in sorted(path.glob("*.safetensors")) if _adapts(file)]
    if len(found) > 1:
        raise UserError(f"{path}: {len(found)} LoRAs ({', '.join(file.name for file in found[:3])}); give one file")
    return found[0] if found else None


def adapter_keys(keys: Iterable[str]) -> list[str]:
    """Those of some tensors' names that are an adapter's."""
    return [key for key in keys if _ADAPTER.fullmatch(key)]


def metadata_of(file: Path) -> dict[str, str]:
    """The strings in a safetensors file's header; empty where there are none."""
    found = _header(file).get("__metadata__") or {}
    return {str(key): str(value) for key, value in found.items()}


def _adapts(file: Path) -> bool:
    keys = [key for key in _header(file) if key != "__metadata__"]
    return bool(keys) and len(adapter_keys(keys)) > len(keys) / 2  # beside `alpha`, or what a training also changed


def _header(file: Path) -> dict[str, Any]:
    """Names to what the header says of them; empty where the file is broken, which opening it tells."""
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    except (OSError, ValueError, MemoryError, OverflowError):
        return {}
    return found if isinstance(found, dict) else {}
