"""Recipes: the packaged ones, and how a name, a YAML file or a run folder becomes a checked `Recipe`. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deme_diffusion import processes
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.recipes.checks import keys_of, parse

PACKAGED = Path(__file__).parent
RESOLVED = "recipe.yaml"


@dataclass(frozen=True)
class Loaded:
    """A recipe with the overrides it was given; `folder` is set when it was read from a run folder."""

    recipe: Recipe
    overrides: dict[str, Any]
    folder: Path | None = None


def packaged() -> dict[str, str]:
    """Name -> description of the recipes that ship."""
    files = sorted(PACKAGED.glob("*.yaml"))
    return {file.stem: str(_read(file).get("description", "")).strip() for file in files}


def load(reference: str, overrides: Iterable[str] = (), *, as_it_stands: bool = False) -> Loaded:
    """The recipe that a packaged name, a YAML path or a run folder stands for, with KEY=VALUE overrides.

    In a launch of several processes it is the recipe trained in so many, unless it is read `as_it_stands`. Raises
    UserError in one line: what, where, the nearest valid value.
    """
    path, folder = _find(reference)
    count = 1 if as_it_stands else processes.count()
    # What a launch does in many processes it does one training at a time; jobs that a command asks for are refused.
    changes = {} if count == 1 else {"pretrain.processes": count, "decouple.processes": count, "runtime.jobs": 1}
    changes |= dict(_override(text) for text in overrides)
    values = _resolved(path)
    for dotted, value in changes.items():
        _set(values, dotted, value)
    return Loaded(parse(values, where=str(reference)), changes, folder)


def changed(recipe: Recipe, change: Mapping[str, Any]) -> Recipe:
    """The recipe with some settings changed, config path -> value. Raises UserError as `load` does."""
    values = recipe.model_dump(mode="json")
    for dotted, value in change.items():
        _set(values, dotted, value)
    return parse(values, where=", ".join(f"{key}={value}" for key, value in change.items()))


def defaults(overrides: Iterable[str] = ()) -> Recipe:
    """Every setting at its default, but for KEY=VALUE overrides."""
    values: dict[str, Any] = {}
    for dotted, value in map(_override, overrides):
        _set(values, dotted, value)
    return parse(values, where="overrides")


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe with every default written out; reading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=110)


def _find(reference: str) -> tuple[Path, Path | None]:
    path = Path(reference)
    if path.name == reference and (PACKAGED / f"{reference}.yaml").is_file():
        return PACKAGED / f"{reference}.yaml", None
    if path.is_dir():
        if not (path / RESOLVED).is_file():
            lora = (path / "pytorch_lora_weights.safetensors").is_file()
            rather = (
                "; it is a LoRA: sample its run, or write a whole pipeline by --fuse (merge.fuse=true)" if lora else ""
            )
            raise UserError(f"{path}: no {RESOLVED} in it, so it is no run folder{rather}")
        return path / RESOLVED, path
    if path.is_file():
        return path, None
    raise UserError(
        f"{reference}: no such recipe, file or run folder{nearest(reference, packaged())}; see: deme recipes"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that is none
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is a {type(values).__name__}")
    return values


def _resolved(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's values over those of the recipe that its `extends` names, whose name is not inherited."""
    values = _read(path)
    parent = values.pop("extends", None)
    values.setdefault("name", path.stem)
    if parent is None:
        return values
    beside = path.parent / str(parent)
    source = (beside if beside.is_file() else _find(str(parent))[0]).resolve()
    if source in (*above, path.resolve()):
        raise UserError(f"{path}: extends itself through {parent}")
    return _merged(_resolved(source, (*above, path.resolve())), values)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        mappings = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if mappings else value
    return result


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text}: an override is KEY=VALUE, as in decouple.num_ranges=2")
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{text}: the value is not YAML") from None


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set what a config path names; a number steps into a list, as in evaluate.samplers.0.guidance_scale."""
    parts = dotted.split(".")
    place: Any = values
    for depth in range(len(parts) - 1):
        key: Any = _step(place, parts, depth)
        there = place[key] if isinstance(place, list) else place.get(key)
        if not isinstance(there, dict | list):
            there = _default_list(parts[: depth + 1])
        place[key] = there.copy()  # YAML's aliases share it with another section
        place = place[key]
    place[_step(place, parts, len(parts) - 1)] = value


def _step(place: dict[str, Any] | list[Any], parts: Sequence[str], depth: int) -> str | int:
    """A part of a config path as a key of the section, or an index of the list, where it stands."""
    dotted, part, above = ".".join(parts), parts[depth], ".".join(parts[:depth])
    if isinstance(place, list):
        if not part.isdecimal():
            raise UserError(f"{dotted}: {above} is a list; say which of it, as in {above}.0.{part}")
        if int(part) >= len(place):
            known = f"0 to {len(place) - 1}" if place else "none"
            raise UserError(f"{dotted}: {above} has no {part}; it has {known}")
        return int(part)
    valid = keys_of(parts[:depth])
    if part not in valid:
        sections = [f"{section}.{part}" for section in valid if depth == 0 and part in keys_of([section])]
        hint = f"; did you mean {sections[0]!r}?" if sections else nearest(part, valid)
        raise UserError(f"{dotted}: unknown key{hint}")
    return part


def _default_list(path: Sequence[str]) -> dict[str, Any] | list[Any]:
    """The list that stands there by default, which indices step into; an empty section where none does."""
    found: Any = Recipe.model_validate({}).model_dump(mode="json")
    for part in path:
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, list) else {}
