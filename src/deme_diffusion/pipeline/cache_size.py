"""How large the cache of a recipe is going to be, before it is made: for the dry run. No torch."""

from __future__ import annotations

from math import prod
from typing import Any

from deme_diffusion.artefacts import Store
from deme_diffusion.data.sources import SplitName
from deme_diffusion.pipeline import caching, needs
from deme_diffusion.pipeline.cost_parts import Cost
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.weight_files import read_json

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DIGEST = 8
"""Bytes by which a caption is found."""
SPLITS: tuple[SplitName, ...] = ("train", "search", "report")


def cache_size(graph: Graph, store: Store, cost: Cost | None) -> dict[str, Any] | None:
    """Rows and bytes of latents and text; None without a cache, and, each, where they are not known yet.

    `exact`: whether the images were counted; a caption for each image is assumed before.
    """
    recipe = graph.recipe
    if not isinstance(graph.cache, Node) or cost is None:
        return None
    counted = _counted(graph, store)
    each = BYTES[recipe.cache.dtype]
    views = caching.stored_views(recipe)
    once = set(views.values()) == {1}  # whichever split an image is in
    if counted is None:
        latents = (needs.data_images(recipe) or 0) if once else needs.cached_images(recipe)
        captions = needs.cached_captions(recipe)
    else:
        latents = sum(int(counted["splits"].get(name, 0)) * views[name] for name in SPLITS)
        captions = int(counted["captions"]["distinct"]) + 1 if "captions" in counted else 0
    known = counted is not None or needs.data_images(recipe) is not None
    condition = 0 if cost.encoders is None else cost.encoders.condition
    return {
        "latents": latents if known else None,
        "latents_bytes": latents * prod(cost.shape) * each if known else None,
        "captions": captions if known else None,
        "text_bytes": captions * (condition * each + DIGEST) if known else None,
        "views": views["train"],
        "frozen": caching.frozen(recipe),
        "exact": counted is not None or (once and recipe.data.source == "digits"),
    }


def _counted(graph: Graph, store: Store) -> dict[str, Any] | None:
    """What the index of the images says, where it is made."""
    if not isinstance(graph.data, Node) or store.glimpse(graph.data.key) is None:
        return None
    return read_json(store.folder(graph.data.key) / "index.json")


def size_said(size: dict[str, Any]) -> str:
    """The same in a line."""
    kept = f"; {size['views']} augmented views of each training image" if size["views"] > 1 else ""
    kept = f"; {size['frozen']}" if size["frozen"] else kept
    if size["latents"] is None:
        return f"cache: its size is known once the images are counted{kept}"
    about = "" if size["exact"] else "about "
    text = f"; {_mb(size['text_bytes'])} for {size['captions']:,} distinct captions" if size["captions"] else ""
    if text and not size["exact"]:
        text += " (if each image has one of its own)"
    return f"cache: {about}{_mb(size['latents_bytes'])} for {size['latents']:,} latents{text}{kept}"


def _mb(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
