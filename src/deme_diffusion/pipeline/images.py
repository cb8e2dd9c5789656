"""How a recipe's images enter the graph: the digest of their source, and the stage that indexes them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from deme_diffusion.config import DataSettings, EvaluateSettings
from deme_diffusion.data.captions import NAMED, refusal
from deme_diffusion.data.contents import content_digest
from deme_diffusion.data.sources import Digits, SplitName
from deme_diffusion.errors import UserError
from deme_diffusion.files import canonical_digest
from deme_diffusion.pipeline.inputs import Input, cached_commit, looks_like_hub_name

if TYPE_CHECKING:
    from deme_diffusion.data.splits import Split

Takes = Literal["nothing", "class", "text"]
SEEN = ("augment", "views")
"""Settings that shape what training and measuring see of an image, not the index."""
WHERE = ("source", "path", "revision", "streaming")
"""Settings that only say where the images lie: their content enters by its digest."""
LATER = ("missing_captions",)
"""Settings that decide whether the images will do: what is made of those that do is the same."""
HUB = ("subset", "split")
"""Settings that have a meaning on the hub only."""


def source_of(settings: DataSettings, *, download: bool) -> Input:
    """The images' content. Raises UserError where `data.path` leads to none."""
    if settings.source == "digits":
        both = {"content": Digits.content_digest(), "settings": settings.changed()}
        return Input("data", canonical_digest(both)[:16], None)
    assert settings.path is not None, "checked by the settings"
    if settings.source != "hub":
        return Input(settings.path, content_digest(settings)[:16], None)
    commit = _commit(settings.path, settings.revision or "main", download)
    digest = canonical_digest({"hub data": settings.path, "commit": commit})[:16]
    return Input(f"{settings.path}@{commit[:8]}", digest, None, commit)


def identity(settings: DataSettings, source: Input) -> str:
    """What a model's note of its training images calls them; the mode is of it, since splits hash converted pixels."""
    return settings.source if settings.source == "digits" else f"{source.digest} {settings.mode}"


def indexed(settings: DataSettings, takes: Takes) -> dict[str, Any]:
    """The settings in the key of the index, which holds captions, or the data set's own classes, for models that take
    them only."""
    idle = (*SEEN, *WHERE, *LATER, *(() if settings.source == "hub" else HUB))
    shaping = {key: value for key, value in settings.changed().items() if key not in idle}
    held: dict[str, Any] = {"text": {"captions": True}, "class": {"classes": True}}.get(takes, {})
    return {**shaping, **held}


def seen(settings: DataSettings) -> dict[str, Any]:
    """The settings that enter the key of every stage that looks at the images through the index."""
    changed = settings.changed()
    return {} if settings.source == "digits" else {key: changed[key] for key in SEEN if key in changed}


def check_fit(images: tuple[int, ...], model: tuple[int, ...], settings: DataSettings) -> None:
    """Raises UserError where images (c, h, w) are not of the shape (c, h, w) that the model takes."""
    if images == model:
        return
    (channels, height, width), (taken, rows, columns) = images, model
    if settings.source == "digits":
        remedy = "the digits are 8x8 grey: give other images, or a model for these"
    elif channels != taken:
        modes = {1: "L", 3: "RGB"}
        remedy = f"set data.mode={modes[taken]}" if taken in modes else "no data.mode has so many channels"
    else:
        remedy = f"set data.resolution={rows}" if rows == columns else "data.resolution makes squares only"
    had, wanted = f"{width}x{height} with {channels} channels", f"{columns}x{rows} with {taken} channels"
    raise UserError(f"data: the images are {had}, the model takes {wanted}; {remedy}")


def check_prompts(splits: Mapping[SplitName, Split], takes: Takes) -> None:
    """Raises UserError where images lack the caption, or the label, that the model takes."""
    if takes == "nothing":
        return
    split = splits["train"]
    source, settings = split.source, split.settings
    indices = [i for each in splits.values() for i in each.indices]
    has = source.has_captions if takes == "text" else (lambda i: source.label(i) is not None)
    missing = [i for i in indices if not has(i)]
    named = [source.called(i) for i in sorted(missing)[: NAMED + 1]]
    refused = refusal(named, len(missing), len(indices), settings) if takes == "text" else None
    if takes == "class" and missing:
        where, few = settings.path or settings.source, ", ".join(named[:NAMED])
        refused = f"data: {where}: {len(missing):,} of {len(indices):,} images have no label ({few}); the model takes "
        refused += "classes: complete them, or name data.label_column"
    if refused:
        raise UserError(refused)


def check_enough(sizes: Mapping[str, int], settings: EvaluateSettings) -> None:
    """Raises UserError where a split holds fewer images than a score that is taken on it."""
    nearest = max(settings.neighbours, settings.density_neighbours) + 1
    for split, least in (("train", nearest), ("search", 2), ("report", nearest)):
        if sizes[split] < least:
            raise UserError(f"data: the {split} split holds {sizes[split]} images, and scores need {least}; bring more")


def _commit(name: str, revision: str, download: bool) -> str:
    if not looks_like_hub_name(name):
        raise UserError(f"data.path: {name!r} is no hub name (owner/name), which data.source=hub takes")
    known = cached_commit(name, revision, kind="datasets")
    if not download or known == revision:
        return known or revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # the hub's client raises a dozen kinds, of which none is ours to mend
        if known:
            return known  # offline: what is cached is used
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        remedy = "pin data.revision to a commit that is cached, or use local files"
        raise UserError(f"data.path: {name} could not be reached on the hub ({reason}); {remedy}") from None
