"""Files of others into the layout that the rest reads, and back: one component, a whole pipeline, a public state dict.

The result has a hidden name until it is whole, so nothing half stands under the name that was asked for.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.files import building, replacing, require_space, visible_files
from deme_diffusion.models import projection
from deme_diffusion.models.pickles import plain_state, read_state
from deme_diffusion.models.placement import Shapes, shapes_of
from deme_diffusion.models.projection import COMPONENTS
from deme_diffusion.models.public import PUBLIC_WIDTHS, adapter_widths, public_state, read_public
from deme_diffusion.weight_files import SHARD, checked_parts, read_json
from deme_diffusion.weights import PICKLES, WEIGHTS_NAME, State, Weights, save_state

CONFIG, MODEL_INDEX = "config.json", "model_index.json"
_BESIDE = (".json", ".md", ".txt")
"""What is taken from the top of a pipeline folder: single-file checkpoints and previews are no part of the pipeline."""


@dataclass(frozen=True)
class Converted:
    """Where the result lies, the places whose D is not 0, and what a user is to be told."""

    out: Path
    projections: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(checkpoint: Path, out: Path, like: Path | None = None) -> Converted:
    """A state dict, or a component or pipeline folder with a pickle in it, as `out`, which must not exist yet.

    `like`: a pipeline or component folder whose config and shapes a state dict is checked against; without it, the
    config.json beside the state dict. Raises UserError for what does not fit; pickled code is never run.
    """
    _refuse_existing("--out", out)
    result = Converted(out)
    with building(out) as folder:
        if not checkpoint.is_dir():
            _component([checkpoint], _component_folder(like) if like else checkpoint.parent, folder, result)
        elif not (checkpoint / MODEL_INDEX).is_file():
            files = _weights_in(checkpoint, result)
            _component(files, _component_folder(like) if like else checkpoint, folder, result)
        elif like is None:
            _pipeline(checkpoint, folder, result)
        else:
            raise UserError(f"--like goes with a state dict; {checkpoint} is a pipeline, which has its own config")
    return result


# -- one component ---------------------------------------------------------------------------------


def _component(files: Sequence[Path], like: Path, out: Path, result: Converted) -> None:
    """The state dict in `files` as a component folder, checked against the component folder `like`."""
    state, notes = State(), list[str]()
    for file in files:
        part, notes = read_state(file)
        state |= part
    if not (like / CONFIG).is_file():
        told = "a state dict alone" if like == files[0].parent else f"{like} has no {CONFIG}"
        raise UserError(f"{files[0]}: {told}; name the model that it was trained from: --like PIPELINE")
    config = read_json(like / CONFIG)
    weights, matrices = read_public(state, _shapes(like, config), config, file=files[0], like=str(like))
    require_space(out, sum(file.stat().st_size for file in files))
    out.mkdir(exist_ok=True)
    shutil.copy(like / CONFIG, out / CONFIG)
    _save(out / WEIGHTS_NAME, weights, files[0])
    projection.save(out, matrices)
    if any(key.startswith("adapter_list.") for key in state):
        found = f"{len(matrices)} projections in {projection.FILE}" if matrices else "all identities, left out"
        notes.append(f"adapter_list: {found}")
    result.projections.extend(matrices)
    result.notes.extend(notes)


def _shapes(component: Path, config: Mapping[str, Any]) -> Shapes:
    """Key -> shape, from a component's safetensors, or from its config where it has none."""
    if any(component.glob("diffusion_pytorch_model*.safetensors")):
        with Weights(component) as weights:
            return {key: weights.shape(key) for key in weights.keys()}  # noqa: SIM118
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name")), None)
    is_model = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    if kind is None or not is_model:
        raise UserError(f"{component / CONFIG}: _class_name {config.get('_class_name')!r} is no model of diffusers")
    try:
        with torch.device("meta"):
            return shapes_of(kind.from_config(dict(config)))
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{component / CONFIG}: makes no {kind.__name__} ({error})") from None


def _save(path: Path, state: State, source: Path) -> None:
    try:
        save_state(path, state)
    except ValueError as error:  # a dtype that safetensors has not
        raise UserError(f"{source}: {error}") from None


def _component_folder(given: Path) -> Path:
    """The denoiser's folder in a pipeline; a component folder as it is."""
    if not given.is_dir():
        raise UserError(f"{given}: no such folder; a diffusers pipeline or component folder is expected")
    inside = [given / name for name in COMPONENTS if (given / name / CONFIG).is_file()]
    return inside[0] if inside else given


def _weights_in(folder: Path, result: Converted) -> list[Path]:
    """The files of a component folder's state dict: its pickles, or safetensors that may hold adapters."""
    groups = _pickles(folder) or {f.name: [f] for f in visible_files(folder) if f.name == WEIGHTS_NAME}
    if (folder / projection.FILE).is_file():
        raise UserError(f"{folder}: has a {projection.FILE}, so it was converted already")
    if not groups:
        raise UserError(f"{folder}: no {MODEL_INDEX} and no checkpoint ({', '.join(PICKLES[:-1])} or {WEIGHTS_NAME})")
    name = WEIGHTS_NAME if WEIGHTS_NAME in groups else next(iter(groups))
    if len(groups) > 1:
        left = [file.name for other, files in groups.items() if other != name for file in files]
        result.notes.append(f"took {groups[name][0].name}, not {', '.join(left)}")
    return groups[name]


def _pickles(folder: Path) -> dict[str, list[Path]]:
    """The pickles right in a folder, the shards of one together, by the name that safetensors gives them."""
    groups: dict[str, list[Path]] = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in PICKLES):
        # transformers' pytorch_model.bin is model.safetensors.
        whole = re.sub(r"^pytorch_model", "model", SHARD.sub("", file.stem))
        groups.setdefault(f"{whole}.safetensors", []).append(file)
    for files in groups.values():
        shards = SHARD.search(files[0].name)
        if shards and int(shards[1]) != len(files):
            raise UserError(f"{folder}: {len(files)} of the {int(shards[1])} shards of {files[0].name} are there")
    return groups


# -- a whole pipeline ------------------------------------------------------------------------------


def _pipeline(source: Path, out: Path, result: Converted) -> None:
    """Every part that the index lists, in a folder of its own; early hub models hold all parts in one."""
    index = read_json(source / MODEL_INDEX)
    listed = (name for name, kind in index.items() if isinstance(kind, list) and any(kind) and name[:1] != "_")
    names = checked_parts(source / MODEL_INDEX, listed)
    if not any(_pickles(part) for part in [source, *(source / name for name in names)] if part.is_dir()):
        raise UserError(f"{source}: no pickle in it, so there is nothing to convert")
    for name in names:
        if (source / name).is_dir():
            _part(source / name, out / name, name, result)
        elif (source / f"{name}_config.json").is_file():
            (out / name).mkdir()
            shutil.copy(source / f"{name}_config.json", out / name)
        elif name in COMPONENTS and (source / CONFIG).is_file():
            _component(_weights_in(source, result), source, out / name, result)
        else:
            raise UserError(f"{source}: {MODEL_INDEX} lists {name}, and there is no such folder")
    for file in source.iterdir():
        own = file.name == MODEL_INDEX or file.suffix != ".json" or not (source / CONFIG).is_file()  # else a part's
        if own and file.is_file() and file.suffix in _BESIDE and not file.name.startswith("."):
            shutil.copy(file, out / file.name)


def _part(source: Path, out: Path, name: str, result: Converted) -> None:
    out.mkdir()
    require_space(out, sum(file.stat().st_size for file in visible_files(source)))
    groups = _pickles(source)
    if name in COMPONENTS and not any(source.glob("*.safetensors")):
        _component(_weights_in(source, result), source, out, result)
        done = {file for files in groups.values() for file in files}
    else:
        done = {f for target, files in groups.items() if _plain(target, files, source, out, result) for f in files}
    for file in visible_files(source):
        at, index = out / file.relative_to(source), done and file.name.endswith(".bin.index.json")
        if file not in done and not index and not at.exists():
            at.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, at)


def _plain(target: str, files: Sequence[Path], source: Path, out: Path, result: Converted) -> bool:
    """Convert another part's pickle; False, and said, where it is more than tensors."""
    label = files[0].relative_to(source.parent)
    if (source / target).is_file():
        return True  # the safetensors are copied, and the pickle stays behind
    state = State()
    for file in files:
        part = plain_state(file, modern=target.startswith("diffusion_"))
        if part is None:
            result.notes.append(f"{label}: more than tensors, or broken; copied as it is")
            return False
        state |= part
    _save(out / target, state, files[0])
    return True


# -- back to the public code -----------------------------------------------------------------------


def write_public(model: Path, file: Path) -> Converted:
    """A component's or pipeline's weights as a state dict that the public code's model takes, in one pickle."""
    if file.suffix not in PICKLES:
        raise UserError(f"--to-public {file}: the public code reads a pickle; name it {file.stem}.bin")
    _refuse_existing("--to-public", file)
    component = _component_folder(model)
    if not (component / CONFIG).is_file():
        raise UserError(f"{component}: no {CONFIG}; a diffusers pipeline or component folder is expected")
    matrices = projection.load(component)
    with Weights(component) as weights:
        state = {key: weights.tensor(key) for key in weights.keys()}  # noqa: SIM118
        shapes = {key: weights.shape(key) for key in state}
    projection.check_fits(matrices, shapes, component / projection.FILE, "the model beside it")
    state = public_state(state, matrices, read_json(component / CONFIG), where=component)
    require_space(file.parent, sum(tensor.nbytes for tensor in state.values()))
    with replacing(file) as opened:
        try:
            torch.save(state, opened)
        except RuntimeError as error:  # torch's writer hides what the system said
            told = error.__context__
            raise told if isinstance(told, OSError) else MachineError(f"cannot write {file}: {error}") from None
    notes = []
    if (widths := adapter_widths(state)) != PUBLIC_WIDTHS:
        notes.append(f"the public code's add_adapters has other widths written in; give it {list(widths)}")
    return Converted(file, [place for place, matrix in matrices.items() if matrix.count_nonzero()], notes)


# -- files -----------------------------------------------------------------------------------------


def _refuse_existing(option: str, path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UserError(f"{option} {path}: exists already, and is kept; give another name")
