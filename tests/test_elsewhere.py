"""Models trained elsewhere: refused by what is read of them, before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import make_pico_values
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline import elsewhere
from deme_diffusion.pipeline.figures import overrides_for
from deme_diffusion.pipeline.inputs import Input, resolve
from deme_diffusion.recipes import defaults
from deme_diffusion.recipes.checks import parse

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(pico_pipeline: Path) -> Input:
    return resolve(str(pico_pipeline), None, key="model.pretrained", needs=(), download=False)


@pytest.fixture
def other(pico_pipeline: Path, tmp_path: Path) -> Path:
    shutil.copytree(pico_pipeline / "unet", tmp_path / "other")
    return tmp_path / "other"


def given(folder: Path, base: Input) -> Input:
    recipe = parse(make_pico_values(base.folder), where="test")
    return elsewhere.given(str(folder), base, recipe, key="analyze.merged")


def refused(folder: Path, base: Input, match: str) -> None:
    with pytest.raises(UserError, match=rf"^analyze\.merged: .*{match}"):
        given(folder, base)


def config(folder: Path, **changes: Any) -> None:
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_a_component_of_the_bases_tensors_is_taken(base: Input, other: Path) -> None:
    assert given(other, base).path == other


def test_tensors_of_other_names_or_shapes_are_refused(base: Input, other: Path) -> None:
    tensors = load_file(other / WEIGHTS)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 1)
    save_file(tensors | {name: np.zeros(3, np.float32)}, other / WEIGHTS)
    refused(other, base, rf"another architecture: {name} is \(3,\), the base's \(")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, other / WEIGHTS)
    refused(other, base, f"has no tensor {name}, which the base has")
    save_file(tensors | {"more": np.zeros(3, np.float32)}, other / WEIGHTS)
    refused(other, base, "has a tensor more that the base has not")


def test_what_is_no_model_is_named(base: Input, other: Path) -> None:
    refused(other / WEIGHTS, base, "is a file; give its folder")
    config(other, _class_name=None)
    refused(other, base, "config.json says no _class_name")
    (other / "config.json").write_text("{")
    refused(other, base, "no readable JSON mapping")
    (other / "config.json").unlink()
    (other / "pytorch_lora_weights.safetensors").touch()
    refused(other, base, "a LoRA, no model")


@pytest.mark.parametrize("given", [([""], None), (None, "")])
def test_an_empty_folder_is_not_the_current_one(given: tuple[list[str] | None, str | None]) -> None:
    with pytest.raises(UserError, match=r"--(expert|merged) '': empty"):
        overrides_for(*given)


def test_a_folder_of_any_name_survives(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("ü", "🦊 #1: {x}", 'a"b')]
    read = defaults(overrides_for(names, names[1])).analyze
    assert read.experts is not None and [*read.experts] == names and read.merged == names[1]
