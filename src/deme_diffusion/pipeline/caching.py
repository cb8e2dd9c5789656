"""The stage `cache`: what shapes it, and caches that were made elsewhere. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme_diffusion.artefacts import Key
from deme_diffusion.config import AugmentSettings, ModelSettings, Recipe
from deme_diffusion.data.sources import SplitName
from deme_diffusion.digests import recall, remember, size_and_time
from deme_diffusion.errors import UserError
from deme_diffusion.files import canonical_digest, file_digest, visible_files
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.weight_files import read_json, weight_files

RECORD = "cache.json"
"""What a cache is told by (`data.encoded`, which needs torch)."""
READ = {".json", ".txt", ".model"}
"""Endings of the files of a tokenizer: configs, vocabularies."""
ENCODE = re.compile(r"vae|(text_encoder|tokenizer)(_\d+)?")
"""The names of the parts that encode."""
EMPTY = "force_zeros_for_empty_prompt"
"""The entry of a pipeline's index by which '' is encoded otherwise than other captions."""
VIEWS = 4
"""Stored views of a training image that is augmented, where `cache.views` is null."""

TRAINED = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "training_guidance")
"""Settings of `model` that are no matter of encoders, whose text comes in the base's precision."""


def kept(recipe: Recipe) -> bool:
    """Whether trainings read a cache: of a latent model, unless it is turned off."""
    return recipe.model.latent and recipe.cache.enabled


def stored_views(recipe: Recipe) -> dict[SplitName, int]:
    """Views of each image that are stored: of training images as many as `cache.views`, where they would differ."""
    views, data = recipe.cache.views or VIEWS, recipe.data
    return {"train": views if _augmented(recipe) else 1, "search": data.views, "report": data.views}


def _augmented(recipe: Recipe) -> bool:
    return recipe.data.augment != AugmentSettings() or recipe.data.crop == "random"


def frozen(recipe: Recipe) -> str | None:
    """What to say of augmentation that a cache of one view turns into one change for good; None where it does not."""
    if not _augmented(recipe) or stored_views(recipe)["train"] > 1:
        return None
    return "each image keeps one augmentation; set cache.views=N or cache.enabled=false"


def covered(recipe: Recipe) -> dict[str, Any]:
    """The settings in the key, beside those by which images are seen."""
    views, dtype = stored_views(recipe)["train"], recipe.cache.changed().get("dtype")
    shaping = {key: value for key, value in recipe.model.shaping().items() if key not in TRAINED}
    stored = {**({"stored": dtype} if dtype else {}), **({"views": views} if views > 1 else {})}
    return {"family": recipe.model.family, **shaping, **stored}


def encoders(base: Input, settings: ModelSettings) -> Input:
    """All of a base but what is trained, by its content; of the hub, by the commit."""
    label = f"encoders of {base.label}"
    if base.commit is not None or base.path is None:
        digest = canonical_digest({"encoders": settings.pretrained, "commit": base.commit})[:16]
        return Input(label, digest, base.path, base.commit)
    return Input(label, _content(base.path), base.path)


def _content(base: Path) -> str:
    """Digest of the parts that encode, as they are loaded, remembered by their files' sizes and times.

    Schedulers, checkers, copies of weights in other precisions and checkpoints beside the parts are no matter of it.
    """
    parts = sorted(part for part in base.iterdir() if part.is_dir() and ENCODE.fullmatch(part.name))
    files = [file for part in parts for file in _loaded(part)]
    index = base / "model_index.json"
    told = read_json(index) if index.is_file() else {}
    wanted = {name: told[name] for name in sorted(told) if ENCODE.fullmatch(name) or (name == EMPTY and told[name])}
    key = ["encoding parts", wanted, *((str(file.absolute()), *size_and_time(file)) for file in files)]
    if digest := recall(key):
        return digest
    digests = {file.relative_to(base).as_posix(): file_digest(file) for file in files}
    remember(key, digest := canonical_digest({"index": wanted, **digests})[:16], path=str(base), files=len(files))
    return digest


def _loaded(part: Path) -> list[Path]:
    """The files of a part that shape what it gives: of a model its config and weights."""
    if part.name.startswith("tokenizer") or not (part / "config.json").is_file():
        return [file for file in visible_files(part) if file.suffix in READ]
    return [part / "config.json", *weight_files(part)]


# -- made elsewhere -------------------------------------------------------------------------------


def made_of(key: Key) -> dict[str, Any]:
    """What `cache.json` says a cache was made of."""
    return {"version": key.version, "settings": dict(key.settings), "inputs": dict(key.inputs)}


def given(recipe: Recipe, key: Key) -> Input:
    """The cache in `cache.folder`. Raises UserError where it is none, or was made of something else."""
    folder = Path(recipe.cache.folder or "").expanduser().absolute()
    if not (folder / RECORD).is_file():
        raise UserError(f"cache.folder: {folder} has no {RECORD}; {_remedy()}")
    there = read_json(folder / RECORD).get("made_of")
    if not isinstance(there, dict):
        raise UserError(f"cache.folder: {folder / RECORD} does not say what it was made of; {_remedy()}")
    if (wrong := _difference(there, made_of(key), recipe)) is not None:
        raise UserError(f"cache.folder: {folder} was made {wrong}; {_remedy()}")
    return Input(f"cache in {folder}", key.digest, folder)


def _difference(there: Mapping[str, Any], here: Mapping[str, Any], recipe: Recipe) -> str | None:
    """In what a cache is not the recipe's, None where it is."""
    theirs, ours = there.get("inputs", {}), here["inputs"]
    if theirs.get("encoders") != ours["encoders"]:
        told = f"({theirs.get('encoders')}) than {recipe.model.pretrained} ({ours['encoders']})"
        return f"with the encoders of another model {told}"
    if theirs.get("data") != ours["data"]:
        return (
            f"of other images, or by other settings of data ({theirs.get('data')}), than this recipe's ({ours['data']})"
        )
    told, wanted = there.get("settings", {}), here["settings"]
    for name in sorted({*told, *wanted}):
        if told.get(name) != wanted.get(name):
            return f"with {_said(name, told)}, where this recipe has {_said(name, wanted)}"
    return None if there.get("version") == here["version"] else "by another version of deme-diffusion"


def _said(name: str, settings: Mapping[str, Any]) -> str:
    key = {"stored": "cache.dtype", "views": "cache.views"}.get(name, f"model.{name}")
    return f"{key} {settings.get(name, 'as it is by default')}"


def _remedy() -> str:
    return "leave cache.folder out, and deme cache makes one that fits"
