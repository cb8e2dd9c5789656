"""What a run will do and need, before it does it: stages, downloads, time, memory, disk. No torch, no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from deme_diffusion.config import FIGURES, Recipe
from deme_diffusion.pipeline import fetching, needs, space
from deme_diffusion.pipeline.cache_size import cache_size, size_said
from deme_diffusion.pipeline.cost_parts import Cost
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.lora_cost import adapter_parameters
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run

FLOPS_PER_CORE = 5e10
"""Assumed rate of one CPU core; a run of digits reaches 58 GFLOP/s a core, its training steps alone 72."""
Precision = Literal["half precision", "TF32", "float32", "TF32 and float32"]
RATES: dict[Precision, float] = {"half precision": 4e13, "TF32": 2e13, "float32": 1e13}
"""Assumed rates of one GPU for U-Nets; of transformers, which are large matrix products, three times as much."""
TRANSFORMERS, FASTER = ("dit", "stable_diffusion_3", "flux", "wan"), 3
ASSUMED = "as of an A100; assumed, not measured"
WAITS = "the division waits for the similarity of gradients: subsets are not known before that stage is done"
KINDS = {"pretrain": "training", "decouple": "training", "search": "search", "sample": "sampling", "cache": "encoding"}
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
    copied = space.copied_said(graph.recipe) if graph.data in missing else None
    downloads, cost = fetching.downloads(graph), needs.model_cost(graph)
    return {
        "recipe": graph.recipe.name,
        "folder": str(run.folder),
        "download": next((entry["name"] for entry in downloads if entry["kind"] == "model"), None),
        "downloads": downloads,
        "stages": stages,
        "provisional": graph.waits(nodes),
        "remarks": [*graph.remarks, *graph.asking.missing, *([copied] if copied else [])],
        "steps": sum(node.steps for node in missing),
        "cache": cache_size(graph, store, cost) if graph.cache in missing else None,
        **_estimates(graph, missing, cost),
    }


def _estimates(graph: Graph, missing: Sequence[Node], cost: Cost | None) -> dict[str, Any]:
    """Numbers for what is not done; None, each, before anything is known of the base."""
    if cost is None:
        unknown = ("model", "flops", "seconds", "gpu_hours", "rates", "disk", "disk_bytes", "memory_bytes")
        return {**dict.fromkeys(unknown), "assumption": ASSUMED}
    work = [(node, needs.flops(graph, node, cost)) for node in missing]
    jobs = min(graph.recipe.runtime.jobs, os.cpu_count() or 1)
    disk, recipe = space.disk(graph, missing, cost), graph.recipe
    return {
        "model": _model(recipe, cost),
        "flops": _by_kind(work),
        "seconds": round(sum(flops for _, flops in work) / FLOPS_PER_CORE / jobs),
        "gpu_hours": sum(flops / _rate(recipe, _precision(recipe, node), cost) for node, flops in work) / 3600,
        "rates": _rates(recipe, [node for node, flops in work if flops], cost),
        "assumption": ASSUMED,
        "disk": disk,
        "disk_bytes": sum(disk.values()),
        "memory_bytes": space.memory(graph, missing, cost),
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
    total = dict.fromkeys(("encoding", "training", "search", "sampling", "measuring", "figures"), 0.0)
    for node, flops in work:
        total[KINDS.get(node.stage, "measuring")] += flops
    return total


def _model(recipe: Recipe, cost: Cost) -> dict[str, Any]:
    """The trained component, and a LoRA for it where experts are such."""
    lora = {"lora_parameters": adapter_parameters(recipe, cost)} if recipe.decouple.lora_rank is not None else {}
    return {"parameters": cost.parameters, "forward_flops": cost.flops, **lora}


def _precision(recipe: Recipe, node: Node) -> Precision:
    """In which a stage computes: only training knows mixed precision, and full finetuning trains in float32."""
    model = recipe.model
    if KINDS.get(node.stage) == "training":
        settings = needs.trained_by(recipe, node)
        if settings.mixed_precision != "no" or (needs.is_lora(recipe, node) and model.dtype != "float32"):
            return "half precision"
        return "TF32" if settings.allow_tf32 else "float32"
    if (model.encoder_dtype if node.stage == "cache" else model.dtype) != "float32":
        return "half precision"
    # torch computes convolutions in TF32 where it is not told otherwise, matrix products in float32.
    if node.stage == "cache":
        return "TF32"  # nearly all of it is the autoencoder's convolutions
    return "float32" if model.family in TRANSFORMERS else "TF32 and float32"


def _rate(recipe: Recipe, precision: Precision, cost: Cost) -> float:
    """FLOP/s of a GPU, of which convolutions and matrix products have each their share of the base's."""
    if precision == "TF32 and float32":
        share = cost.convolved / cost.flops
        return 1 / (share / RATES["TF32"] + (1 - share) / RATES["float32"])
    return RATES[precision] * (FASTER if recipe.model.family in TRANSFORMERS else 1)


def _rates(recipe: Recipe, nodes: Sequence[Node], cost: Cost) -> dict[str, dict[str, Any]]:
    """The precision and FLOP/s that are taken for training, and for the rest of the work."""
    found = {"training" if KINDS.get(n.stage) == "training" else "sampling": _precision(recipe, n) for n in nodes}
    return {kind: {"precision": name, "flops": _rate(recipe, name, cost)} for kind, name in sorted(found.items())[::-1]}


# -- in words -------------------------------------------------------------------------------------


def described(planned: dict[str, Any]) -> list[str]:
    """The plan's downloads and needs, a line each."""
    waits = [WAITS] if planned["provisional"] else []
    kept = [size_said(planned["cache"])] if planned["cache"] else []
    return [*waits, *planned["remarks"], *_downloads_said(planned["downloads"]), *kept, *_needs_said(planned)]


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
    forward = f"{_flops(model['forward_flops'])} for an image's forward pass"
    lora = f" by LoRA of {model['lora_parameters']:,} parameters" if "lora_parameters" in model else ""
    lines = [f"{steps}{lora} of a model of {model['parameters']:,} parameters, {forward}"]
    lines += [f"time: about {said}" for said in _times_said(planned)]
    shares = ", ".join(f"{kind} {_size(size)}" for kind, size in disk.items() if size >= planned["disk_bytes"] / 100)
    lines += [f"disk: about {_size(planned['disk_bytes'])} ({shares})"]
    held = [f"{_size(size)} for {kind}" for kind, size in planned["memory_bytes"].items() if size]
    return [*lines, f"memory: about {', '.join(held)} (activations in float32)"] if held else lines


def _times_said(planned: dict[str, Any]) -> list[str]:
    cores = f"{time_said(planned['seconds'])} on this machine's cores (a rough estimate)"
    rates = [
        f"{said['flops'] / 1e12:.3g} TFLOP/s in {kind} ({said['precision']})" for kind, said in planned["rates"].items()
    ]
    at = f"at {' and '.join(rates)}, {planned['assumption']}"
    gpu = f"{time_said(planned['gpu_hours'] * 3600)} on one GPU {at}"
    fits = planned["seconds"] <= LONGEST_ON_CORES
    worth = not fits or planned["gpu_hours"] * 3600 >= SHORTEST_ON_GPU
    return [said for said, wanted in ((gpu, worth), (cores, fits)) if wanted]


def _flops(number: float) -> str:
    return f"{number / 1e12:.3g} TFLOP" if number >= 1e12 else f"{number / 1e9:,.3g} GFLOP"


def _size(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def time_said(seconds: float) -> str:
    """Minutes, or hours of what takes longer, in two digits: it is no more exact than that."""
    unit, value = ("min", seconds / 60) if seconds < 2 * 3600 else ("hours", seconds / 3600)
    return f"{float(f'{value:.2g}'):,.0f} {unit}"
