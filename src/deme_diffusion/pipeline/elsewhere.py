"""Models trained elsewhere, for figures: folders of pipelines or components, checked by their configs. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import safe_open

from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.pipeline.inputs import COMPONENTS, Input, component_of, resolve
from deme_diffusion.pipeline.node import Node
from deme_diffusion.weight_files import read_json, weight_files

_OF_TRAINING = ("_*", "sample_size", "*dtype*", "*upcast*", "*dropout*", "decay", "*ema*", "*decay*")
"""Keys of a component's config in which models of one architecture may differ."""
EXPECTED = "a diffusers pipeline, or the folder of its component, is expected"
LORA = ("adapter_config.json", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")
"""Of attention, in files that older versions of diffusers wrote."""


def given(folder: str, base: Node | Input, recipe: Recipe, *, key: str) -> Input:
    """The component of a model that `key` names. Raises UserError where there is none, or of another architecture."""
    path = Path(folder).expanduser()
    if path.is_file():
        raise UserError(f"{key}: {folder}: is a file; give its folder: {EXPECTED}")
    if not path.is_dir():
        raise UserError(f"{key}: {folder}: no such folder; {EXPECTED}")
    component = next((part for name in COMPONENTS if _is_component(part := part_of(path, name))), None)
    if component is None and any((path / name).is_file() for name in LORA):
        raise UserError(f"{key}: {folder}: a LoRA, no model; fuse it into its base, save that, and give its folder")
    if component is None:
        raise UserError(f"{key}: {folder}: no config.json of a {' or '.join(COMPONENTS)}; {EXPECTED}")
    try:
        weight_files(component)
        config = read_json(component / "config.json")
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    _check_architecture(config, _config_of(base, recipe), where=f"{key}: {folder}")
    found = resolve(str(component), None, key=key, needs=(), download=False)
    if isinstance(base, Input) and base.path is not None:
        _check_tensors(_shapes(component), _shapes(component_of(base.path)), where=f"{key}: {folder}")
    return found


def _shapes(component: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a component's tensors, by the headers of its files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(component):
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                new = _OLD_NAME.sub(lambda old: f".{_OLD[old[1]]}.{old[2]}", name)
                shapes[new] = tuple(weights.get_slice(name).get_shape())
    return shapes


def _check_tensors(theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    for name in sorted(theirs.keys() ^ ours.keys()):
        whose = "has a tensor {} that the base has not" if name in theirs else "has no tensor {}, which the base has"
        raise UserError(f"{where}: another architecture: {whose.format(name)}")
    for name, shape in theirs.items():
        if shape != ours[name]:
            raise UserError(f"{where}: another architecture: {name} is {shape}, the base's {ours[name]}")


def _is_component(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _config_of(base: Node | Input, recipe: Recipe) -> Mapping[str, Any]:
    """What is known of the base's architecture; nothing of a hub model that a dry run has not downloaded."""
    if isinstance(base, Node):
        unet = recipe.pretrain.unet.model_dump(mode="json")
        return {"_class_name": "UNet2DModel", "out_channels": unet["in_channels"], **unet}
    return {} if base.path is None else read_json(component_of(base.path) / "config.json")


def _check_architecture(theirs: Mapping[str, Any], ours: Mapping[str, Any], *, where: str) -> None:
    named = [config.get("_class_name") for config in (theirs, ours)]
    if not named[0]:
        raise UserError(f"{where}: config.json says no _class_name; {EXPECTED}")
    if all(named) and named[0] != named[1]:
        raise UserError(f"{where}: another architecture: a {named[0]}, the base is a {named[1]}")
    for name in sorted(theirs.keys() & ours.keys()):
        if theirs[name] != ours[name] and not any(fnmatchcase(name, pattern) for pattern in _OF_TRAINING):
            said = f"{name} is {theirs[name]}, the base's {ours[name]}"
            raise UserError(f"{where}: another architecture: config.json: {said}")
