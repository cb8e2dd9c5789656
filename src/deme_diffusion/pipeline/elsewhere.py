"""Models trained elsewhere, for figures: folders of pipelines or components, checked by their configs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.files import part_of
from deme_diffusion.pipeline.inputs import COMPONENTS, Input, component_of, resolve
from deme_diffusion.pipeline.node import Node
from deme_diffusion.weight_files import read_json, weight_files

_OF_TRAINING = ("_*", "sample_size", "*dtype*", "*upcast*", "*dropout*", "decay", "*ema*", "*decay*")
"""Keys of a component's config in which models of one architecture may differ."""
EXPECTED = "a diffusers pipeline, or the folder of its component, is expected"


def given(folder: str, base: Node | Input, recipe: Recipe, *, key: str) -> Input:
    """The component of a model that `key` names. Raises UserError where there is none, or of another architecture."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{key}: {folder}: no such folder; {EXPECTED}")
    component = next((part for name in COMPONENTS if _is_component(part := part_of(path, name))), None)
    if component is None:
        raise UserError(f"{key}: {folder}: no config.json of a {' or '.join(COMPONENTS)}; {EXPECTED}")
    weight_files(component)
    _check_architecture(read_json(component / "config.json"), _config_of(base, recipe), where=f"{key}: {folder}")
    return resolve(str(component), None, key=key, needs=(), download=False)


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
    if all(named) and named[0] != named[1]:
        raise UserError(f"{where}: another architecture: a {named[0]}, the base is a {named[1]}")
    for name in sorted(theirs.keys() & ours.keys()):
        if theirs[name] != ours[name] and not any(fnmatchcase(name, pattern) for pattern in _OF_TRAINING):
            said = f"{name} is {theirs[name]}, the base's {ours[name]}"
            raise UserError(f"{where}: another architecture: config.json: {said}")
