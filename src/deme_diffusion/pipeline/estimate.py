"""What a run will do and need, before it does it: stages, downloads, time, memory, disk. No torch, no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from deme_diffusion.config import FIGURES, Recipe
from deme_diffusion.pipeline import needs
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run
from deme_diffusion.pipeline.unet_cost import Cost

FLOPS_PER_CORE = 5e10
"""Assumed rate of one CPU core; a run of digits reaches 58 GFLOP/s a core, its training steps alone 72."""
HALF, SINGLE = 4e13, 2e13
"""Assumed rates of one GPU in half precision, and in TF32: torch's default for sampling, `allow_tf32` in training."""
ASSUMED = (
    "at 40 TFLOP/s in fp16 or bf16 and 20 in TF32 (plain float32 takes about twice as long), as of an A100; "
    "assumed, not measured"
)
WAITS = "the division waits for the similarity of gradients: subsets are not known before that stage is done"
KINDS = {"pretrain": "training", "decouple": "training", "search": "search", "sample": "sampling"}
KINDS |= {str(name): "figures" for name in FIGURES}
LONGEST_ON_CORES, SHORTEST_ON_GPU = 14 * 24 * 3600, 600
"""Seconds: what takes longer is nothing for cores; what takes less, no GPU would run at its rate."""


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
    missing = [node for node, stage in zip(nodes, stages, strict=True) if stage["status"] != "done"]
    downloads = needs.downloads(graph)
    return {
        "recipe": graph.recipe.name,
        "folder": str(run.folder),
        "download": next((entry["name"] for entry in downloads if entry["kind"] == "model"), None),
        "downloads": downloads,
        "stages": stages,
        "provisional": graph.waits(nodes),
        "remarks": graph.remarks,
        "steps": sum(node.steps for node in missing),
        **_estimates(graph, missing, needs.model_cost(graph)),
    }


def _estimates(graph: Graph, missing: Sequence[Node], cost: Cost | None) -> dict[str, Any]:
    """Numbers for what is not done; None, each, before anything is known of the base."""
    if cost is None:
        unknown = ("model", "flops", "seconds", "gpu_hours", "disk", "disk_bytes", "memory_bytes")
        return {**dict.fromkeys(unknown), "assumption": ASSUMED}
    work = [(node, needs.flops(graph, node, cost)) for node in missing]
    jobs = min(graph.recipe.runtime.jobs, os.cpu_count() or 1)
    disk = needs.disk(graph, missing, cost)
    return {
        "model": {"parameters": cost.parameters, "forward_flops": cost.flops},
        "flops": _by_kind(work),
        "seconds": round(sum(flops for _, flops in work) / FLOPS_PER_CORE / jobs),
        "gpu_hours": sum(flops / _rate(graph.recipe, node) for node, flops in work) / 3600,
        "assumption": ASSUMED,
        "disk": disk,
        "disk_bytes": sum(disk.values()),
        "memory_bytes": needs.memory(graph, missing, cost),
    }


def seconds_of(left: Sequence[tuple[Graph, Node]]) -> float | None:
    """Seconds on this machine's cores for stages of several graphs; None before anything is known of a base."""
    costs: dict[str, Cost | None] = {}
    total = 0.0
    for graph, node in left:
        if (base := graph.base.digest) not in costs:
            costs[base] = needs.model_cost(graph)
        if (cost := costs[base]) is None:
            return None
        total += needs.flops(graph, node, cost) / FLOPS_PER_CORE / min(graph.recipe.runtime.jobs, os.cpu_count() or 1)
    return total


def _by_kind(work: Sequence[tuple[Node, float]]) -> dict[str, float]:
    total = dict.fromkeys(("training", "search", "sampling", "measuring", "figures"), 0.0)
    for node, flops in work:
        total[KINDS.get(node.stage, "measuring")] += flops
    return total


def _rate(recipe: Recipe, node: Node) -> float:
    """FLOP/s of a GPU; only training knows mixed precision."""
    training = KINDS.get(node.stage) == "training"
    return HALF if training and needs.trained_by(recipe, node).mixed_precision != "no" else SINGLE


# -- in words -------------------------------------------------------------------------------------


def described(planned: dict[str, Any]) -> list[str]:
    """The plan's downloads and needs, a line each."""
    waits = [WAITS] if planned["provisional"] else []
    return [*waits, *planned["remarks"], *_downloads_said(planned["downloads"]), *_needs_said(planned)]


def _downloads_said(downloads: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in downloads:
        size = f", {_size(entry['bytes'])}" if entry["bytes"] else ", size unknown"
        note = f"; {entry['note']}" if entry["note"] else ""
        lines.append(f"to download: {entry['name']} ({entry['kind']}{size}){note}")
    return lines


def _needs_said(planned: dict[str, Any]) -> list[str]:
    steps = f"to do: {planned['steps']:,} steps"
    if planned["model"] is None:
        return [f"{steps}; time, memory and disk are unknown before the base is here"]
    model, disk = planned["model"], planned["disk"]
    forward = f"{model['forward_flops'] / 1e9:,.3g} GFLOP for an image's forward pass"
    lines = [f"{steps} of a model of {model['parameters']:,} parameters, {forward}"]
    lines += [f"time: about {said}" for said in _times_said(planned)]
    shares = ", ".join(f"{kind} {_size(size)}" for kind, size in disk.items() if size >= planned["disk_bytes"] / 100)
    lines += [f"disk: about {_size(planned['disk_bytes'])} ({shares})"]
    held = [f"{_size(size)} for {kind}" for kind, size in planned["memory_bytes"].items() if size]
    return [*lines, f"memory: about {', '.join(held)} (activations in float32)"] if held else lines


def _times_said(planned: dict[str, Any]) -> list[str]:
    cores = f"{time_said(planned['seconds'])} on this machine's cores (a rough estimate)"
    gpu = f"{time_said(planned['gpu_hours'] * 3600)} on one GPU {planned['assumption']}"
    fits = planned["seconds"] <= LONGEST_ON_CORES
    worth = not fits or planned["gpu_hours"] * 3600 >= SHORTEST_ON_GPU
    return [said for said, wanted in ((gpu, worth), (cores, fits)) if wanted]


def _size(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def time_said(seconds: float) -> str:
    """Minutes, or hours of what takes longer, in two digits: it is no more exact than that."""
    unit, value = ("min", seconds / 60) if seconds < 2 * 3600 else ("hours", seconds / 3600)
    return f"{float(f'{value:.2g}'):,.0f} {unit}"
