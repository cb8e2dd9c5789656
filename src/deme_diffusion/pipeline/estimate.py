"""What a run will do and need, before it does it: stages, steps, time, disk. No torch, no network."""

from __future__ import annotations

import os
from math import prod
from typing import Any

from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import component_of, read_json, weight_bytes
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run

FLOPS_PER_CORE = 2.5e10
"""Assumed rate of one CPU core on small convolutions (17 to 50 GFLOP/s were measured); a GPU is far faster."""


def plan(run: Run, only: set[str] | None = None) -> dict[str, Any]:
    """The dry run: stages (all, or those of some digests) with their state, and estimates for what is not done."""
    graph, store = run.graph, run.store
    nodes = [node for node in graph.nodes if only is None or node.digest in only]
    stages = [
        {
            "stage": node.stage,
            "label": node.label,
            "digest": node.digest,
            "status": store.status(node.key),
            "steps": node.steps,
        }
        for node in nodes
    ]
    missing = [node for node in nodes if store.status(node.key) != "done"]
    weights = _component_bytes(graph)
    seconds = None if weights is None else sum(_seconds(graph, node, weights) for node in missing)
    jobs = min(graph.recipe.runtime.jobs, os.cpu_count() or 1)
    return {
        "recipe": graph.recipe.name,
        "folder": str(run.folder),
        "download": graph.base.label if not isinstance(graph.base, Node) and graph.base.path is None else None,
        "stages": stages,
        "steps": sum(node.steps for node in missing),
        "seconds": None if seconds is None else round(seconds / jobs),
        "disk_bytes": None if weights is None else sum(_disk(graph, node, weights) for node in missing),
    }


def _component_bytes(graph: Graph) -> int | None:
    """Bytes of the base's weights, from the safetensors headers; None before they are downloaded or trained."""
    base = graph.base
    if isinstance(base, Node) or base.path is None:
        return None
    return sum(weight_bytes(file) for file in component_of(base.path).glob("*.safetensors"))


def _seconds(graph: Graph, node: Node, weights: int) -> float:
    """Forward FLOPs of a U-Net are about 2 x parameters x pixels / 4, since most parameters sit at low resolution."""
    recipe = graph.recipe
    pixels = recipe.pretrain.unet.sample_size**2 if isinstance(graph.base, Node) else _sample_pixels(graph)
    forward = 2 * (weights / 4) * pixels / 4
    passes = 3 + (node.stage == "decouple" and recipe.decouple.consistency_weight > 0)
    settings = recipe.pretrain if node.stage == "pretrain" else recipe.decouple
    images = node.steps * settings.train_batch_size * settings.gradient_accumulation_steps
    flops = forward * (passes * images + node.images + _searched_images(graph, node))
    return flops / FLOPS_PER_CORE


def _searched_images(graph: Graph, node: Node) -> int:
    if node.stage != "search":
        return 0
    merge, experts = graph.recipe.merge, node.arguments["experts"]
    extra = len(merge.scales) if merge.search == "least_squares" else len(merge.grid_values) ** experts
    return int((experts + 2 + extra) * merge.num_images * merge.sampler.num_inference_steps)


def _sample_pixels(graph: Graph) -> int:
    assert not isinstance(graph.base, Node)
    size = read_json(component_of(graph.base.folder) / "config.json").get("sample_size") or 32
    return prod(size) if isinstance(size, list) else int(size) ** 2


def _disk(graph: Graph, node: Node, weights: int) -> int:
    """What stays, and for the longest while it trains: raw and averaged weights, one checkpoint of five times them."""
    if node.stage in ("decouple", "pretrain"):
        return weights * 2 + weights * 5 // max(1, len(list(graph.of_stage(node.stage))))
    if node.stage == "sample":
        return graph.recipe.evaluate.num_images * _sample_pixels(graph) * 3
    return weights if node.stage == "merge" else 100_000
