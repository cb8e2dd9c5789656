"""The trained part of a pipeline, opened: of the family's class, from whole files, with weights that fit its config."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.models.precision import held_in
from deme_diffusion.weight_files import TRANSFORMERS_NAME, WEIGHTS_NAME, read_json, weight_files
from deme_diffusion.weights import Weights, check_component

FITTING: dict[str, str] = {
    "UNet2DModel": "ddpm",
    "UNet2DConditionModel": "stable_diffusion",
    "Transformer2DModel": "dit",
    "DiTTransformer2DModel": "dit",
    "SD3Transformer2DModel": "stable_diffusion_3",
    "FluxTransformer2DModel": "flux",
    "WanTransformer3DModel": "wan",
}
"""Class of a component in diffusers -> the family that it belongs to."""
_SHARD = r"(?:-\d{5}-of-\d{5})?"
_VARIANT = re.compile(
    rf"(?:diffusion_pytorch_model|model){_SHARD}\.(?!safetensors)([A-Za-z][\w-]*?){_SHARD}\.safetensors"
)


def opened_component(
    pipeline: Path, component: str, kinds: str | Sequence[str], family: str, dtype: torch.dtype | None = None
) -> Any:
    """The component of a pipeline folder, checked to be of one of the classes `kinds`, loaded as the first of them.

    `dtype` None: float32, whatever the file holds. Raises UserError where it is another class, or none.
    """
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return loaded_component(checked_component(pipeline, component, kinds, family), kinds[0], dtype)


def checked_component(pipeline: Path, component: str, kinds: Sequence[str], family: str) -> Path:
    """The component's folder. Raises UserError where it is of no class of `kinds`; names the family that would fit."""
    folder = part_of(pipeline, component)
    fitting = fitting_family(pipeline)
    hint = f"; model.family: {fitting} fits it" if fitting not in (None, family) else ""
    there = (folder / "config.json").is_file()
    found = read_json(folder / "config.json").get("_class_name") if there else None
    if hint and not there:
        raise UserError(f"{pipeline}: no {component}, which family {family} needs{hint}")
    if there and found not in kinds:
        raise UserError(f"{folder}: a {found}, but family {family} needs a {kinds[0]}{hint}")
    if hint:
        raise UserError(f"{folder}: a {found} that family {family} does not know{hint}")
    check_default_names(folder)
    check_component(folder)
    return folder


def fitting_family(pipeline: Path) -> str | None:
    """The family of what a pipeline folder holds, by its component's config; None where none fits."""
    for folder in (pipeline / "unet", pipeline / "transformer", pipeline):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            if config.get("addition_embed_type") == "text_time":
                return "stable_diffusion_xl"
            return FITTING.get(str(config.get("_class_name")))
    return None


def check_default_names(folder: Path) -> None:
    """Raises UserError for a folder with nothing but variants of the weights (`.fp16.`), which stock loading passes."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    whole = any(name.startswith((WEIGHTS_NAME, TRANSFORMERS_NAME)) for name in names)
    for found in () if whole else sorted(filter(None, map(_VARIANT.fullmatch, names)), key=lambda match: match[0]):
        name = found[0].replace(f".{found[1]}", "", 1)
        raise UserError(
            f"{folder}: the weights are there only as variant {found[1]}, which from_pretrained does not take by "
            f"itself; fetch the default files, or rename {found[0]} to {name}"
        )


def check_parts(pipeline: Path, names: Iterable[str], family: str) -> None:
    """Raises one UserError for the parts that are missing beside the component, or whose weights are not loadable."""
    missing = [name for name in names if not (pipeline / name).is_dir() or not any((pipeline / name).iterdir())]
    if missing:
        raise UserError(f"{pipeline}: no {', '.join(missing)}, which family {family} needs beside what it trains")
    for name in names:
        if (pipeline / name / "config.json").is_file():  # not of tokenizers
            check_default_names(pipeline / name)
            weight_files(pipeline / name)


def loaded_component(folder: Path, kind: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The diffusers model of class `kind` in a folder. Raises UserError where its weights do not fit its config."""
    import diffusers

    with Weights(folder):  # opening them tells a truncated, missing or pickled file in one line
        pass
    module: nn.Module
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    # diffusers loads classes that keep parts in float32 (Wan's) in no other way than on the meta device first.
    sparing = getattr(getattr(diffusers, kind), "_keep_in_fp32_modules", None) is not None
    try:
        with quiet("diffusers"):
            module, found = getattr(diffusers, kind).from_pretrained(
                folder, low_cpu_mem_usage=sparing, output_loading_info=True, **options
            )
    except (RuntimeError, ValueError) as error:  # shapes
        raise UserError(f"{folder}: weights do not fit config.json: {' '.join(str(error).split())}") from None
    # diffusers only warns of missing keys, and leaves them at random values.
    wrong = [f"{len(keys)} {what.replace('_', ' ')} ({sorted(keys)[0]}, ...)" for what, keys in found.items() if keys]
    if wrong:
        raise UserError(f"{folder}: weights do not fit config.json: {', '.join(wrong)}")
    # Where it does not load onto the meta device, diffusers leaves some classes (SD3's) in float32.
    return module if dtype is None else held_in(module, dtype)


def longer(tokenizer: Any, captions: Sequence[str], most: int) -> list[bool]:
    """Of each caption, whether a tokenizer makes more tokens of it than `most`."""
    if not captions:
        return []
    with quiet("transformers"):
        return [len(ids) > most for ids in tokenizer(list(captions)).input_ids]


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """No progress bars and no remarks of these libraries (`diffusers`, `transformers`) on stderr, only their errors."""
    with warnings.catch_warnings(), ExitStack() as undo:
        warnings.simplefilter("ignore")
        for library in libraries:
            logs: Any = import_module(f"{library}.utils.logging")
            undo.callback(logs.set_verbosity, logs.get_verbosity())
            logs.set_verbosity_error()
            if logs.is_progress_bar_enabled():
                undo.callback(logs.enable_progress_bar)
                logs.disable_progress_bar()
        yield
