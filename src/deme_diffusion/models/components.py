"""The trained part of a pipeline, opened: of the family's class, from whole files, with weights that fit its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.weight_files import read_json
from deme_diffusion.weights import Weights, check_component


def opened_component(pipeline: Path, component: str, kind: str, family: str, dtype: torch.dtype | None = None) -> Any:
    """The component of a pipeline folder, checked to be a `kind`. Raises UserError where it is another class, or none.

    `dtype` None: float32, whatever the file holds.
    """
    folder = part_of(pipeline, component)
    check_component(folder)
    found = read_json(folder / "config.json").get("_class_name")
    if found != kind:
        raise UserError(f"{folder}: a {found}, but family {family} needs a {kind}")
    return loaded_component(folder, kind, dtype)


def loaded_component(folder: Path, kind: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The diffusers model of class `kind` in a folder. Raises UserError where its weights do not fit its config."""
    import diffusers

    with Weights(folder):  # opening them tells a truncated, missing or pickled file in one line
        pass
    module: nn.Module
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        module, found = getattr(diffusers, kind).from_pretrained(
            folder, low_cpu_mem_usage=False, output_loading_info=True, **options
        )
    except RuntimeError as error:  # shapes
        raise UserError(f"{folder}: weights do not fit config.json: {' '.join(str(error).split())}") from None
    # diffusers only warns of missing keys, and leaves them at random values.
    wrong = [f"{len(keys)} {what.replace('_', ' ')} ({sorted(keys)[0]}, ...)" for what, keys in found.items() if keys]
    if wrong:
        raise UserError(f"{folder}: weights do not fit config.json: {', '.join(wrong)}")
    return module
