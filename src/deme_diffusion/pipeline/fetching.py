"""What a run must fetch before it begins: names, sizes, and what to know of them. No torch, no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deme_diffusion.pipeline.facts import known
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import CONVERT, Input, is_cached

PICKLED = f"its weights are a pickle, which is never loaded; {CONVERT}"
GATED = "gated: accept its licence on the hub, then: hf auth login"


def downloads(graph: Graph) -> list[dict[str, Any]]:
    """What must be fetched first: kind, name, bytes (None: unknown) and what to know of it."""
    recipe, found, facts = graph.recipe, [], known()
    if isinstance(graph.base, Input) and graph.base.path is None:
        found.append(_download("model", graph.base, facts["models"].get(recipe.model.pretrained, {})))
    if recipe.data.source == "hub" and not is_cached(str(recipe.data.path), graph.source.commit, kind="datasets"):
        found.append(_download("data", graph.source, facts["data"].get(recipe.data.path, {})))
    if isinstance(graph.extractor, Input) and graph.extractor.path is None:
        inception = facts["inception"] if recipe.extractor.kind == "inception" else {}
        found.append(_download("extractor", graph.extractor, inception))
    if isinstance(graph.clip, Input) and graph.clip.path is None:
        found.append(_download("clip", graph.clip, facts["clips"].get(recipe.clip.pretrained, {})))
    return found


def _download(kind: str, what: Input, facts: Mapping[str, Any]) -> dict[str, Any]:
    note = PICKLED if facts.get("pickled") else GATED if facts.get("gated") else ""
    return {"kind": kind, "name": what.label, "bytes": facts.get("bytes"), "note": note}
