"""What the stages of a graph need: FLOPs, memory, disk, downloads. No torch, no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any

import yaml

from deme_diffusion.config import FIGURES, PretrainSettings, Recipe, TrainSettings
from deme_diffusion.data.sources import SplitName
from deme_diffusion.division import reported, whole
from deme_diffusion.merging.search import Space, expected
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import CONVERT, Input, component_of, is_cached, weight_bytes
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.unet_cost import FLOAT, Cost, unet_cost
from deme_diffusion.weight_files import read_json

KNOWN = Path(__file__).parent / "known.yaml"
DIGITS = 1797
PICKLED = f"its weights are a pickle, which is never loaded; {CONVERT}"
COMPARED = 16
"""Samples at most in a batch of the stage similarity (`analysis.similarity.MOST_AT_ONCE`, which needs torch)."""
MODELS_SHOWN, TILE = 3, 3 * 128 * 128
"""Of the grids: base, ensemble and merged; the bytes of an image at most (`analysis.trajectory.SIDE`)."""
HELD = 5
"""Copies of the weights that a figure of losses holds at most: base, the point, directions and how they are made."""
SMALL = 100_000
"""Bytes of a stage that leaves numbers only."""


@cache
def known() -> dict[str, Any]:
    """The facts about hub names in `known.yaml`."""
    facts: dict[str, Any] = yaml.safe_load(KNOWN.read_text(encoding="utf-8"))
    return facts


def model_cost(graph: Graph) -> Cost | None:
    """The base's cost: from the recipe, its config, or what is known of its hub name; None where nothing is."""
    recipe = graph.recipe
    if isinstance(graph.base, Node):
        unet = recipe.pretrain.unet
        return unet_cost({**unet.model_dump(), "out_channels": unet.in_channels})
    if graph.base.path is None:
        facts = known()["models"].get(recipe.model.pretrained)
        return unet_cost(known()["unets"][facts["unet"]]) if facts else None
    component = component_of(graph.base.path)
    config = read_json(component / "config.json")
    counted = unet_cost(config) if config.get("_class_name") == "UNet2DModel" else None
    return counted or _rough_cost(component, config)


def _rough_cost(component: Path, config: Mapping[str, Any]) -> Cost:
    """For an architecture that cannot be counted: most parameters sit at low resolution, at a quarter of the pixels."""
    parameters = sum(weight_bytes(file) for file in component.glob("*.safetensors")) // FLOAT
    size = config.get("sample_size") or 32
    height, width = (size, size) if isinstance(size, int) else size
    shape = (int(config.get("in_channels") or 3), int(height), int(width))
    return Cost(parameters, 2.0 * parameters * height * width / 4, 0, 0, 0, shape)


# -- FLOPs ----------------------------------------------------------------------------------------


def flops(graph: Graph, node: Node, cost: Cost) -> float:
    """FLOPs of one stage. What reading images, merging and timing cost is left out: it is little."""
    if node.stage in ("decouple", "pretrain"):
        return cost.flops * (_trained(graph, node) + _validated(graph, node))
    if node.stage == "search":
        return cost.flops * _searched(graph.recipe, node)
    if node.stage == "fisher":
        return cost.flops * 3 * int(node.arguments["samples"])  # forward and backward
    if node.stage == "similarity":
        return cost.flops * 3 * _bins(graph, node) * graph.recipe.similarity.num_images
    if node.stage in FIGURES:
        return cost.flops * (node.images + _figured(graph.recipe, node))
    if node.stage == "features":
        return _extracted(graph.recipe, node)
    return cost.flops * (node.images + _loss_points(graph.recipe, "report") * _ranges(node))


def _trained(graph: Graph, node: Node) -> float:
    """Forward passes: 3 an image for student and gradient, one for the teacher, one for checkpointed activations."""
    settings = trained_by(graph.recipe, node)
    passes: float = 3 + has_teacher(graph.recipe, node) + graph.recipe.runtime.gradient_checkpointing
    return passes * node.steps * settings.train_batch_size * settings.gradient_accumulation_steps


def _validated(graph: Graph, node: Node) -> float:
    everything = whole(graph.division.num_timesteps)
    ranges = len(reported(node.arguments.get("subset", everything), graph.division.num_timesteps))
    times = ceil(node.steps / trained_by(graph.recipe, node).validation_steps)
    return times * ranges * _loss_points(graph.recipe, "search")


def _searched(recipe: Recipe, node: Node) -> float:
    """Forward passes: of images that candidates are scored on, and of points of the fixed-noise loss."""
    merge, how = recipe.merge, node.arguments["how"]
    space = Space.of(how.method, int(node.arguments["experts"]), merge.bounds, fixed=how.fixed)
    points = _loss_points(recipe, "search") * _ranges(node)
    asked = expected(space, merge, min(1.0, merge.gradient_batch_size / points) if points else 1.0)
    return asked.scored * merge.num_images * merge.sampler.num_inference_steps + asked.losses * points


def _extracted(recipe: Recipe, node: Node) -> float:
    each = float(known()["inception"]["flops"]) if recipe.extractor.kind == "inception" else 0.0
    return each * _featured(recipe, node)


def _bins(graph: Graph, node: Node) -> int:
    """Bins of the similarity of gradients, of which there are no more than timesteps."""
    subset = node.arguments["subset"] or whole(graph.division.num_timesteps)
    return min(graph.recipe.similarity.bins, sum(hi - lo for lo, hi in subset))


def _figured(recipe: Recipe, node: Node) -> float:
    """Forward passes of a figure: cells of a grid, or models, times the points that each of them is taken on."""
    settings, experts = recipe.analyze, recipe.decouple.num_ranges
    held = split_images(recipe, settings.split)
    points = min(settings.num_images, held or settings.num_images) * settings.draws
    if node.stage == "landscape":
        return settings.landscape_points**2 * points * _ranges(node)
    if node.stage == "plane":
        return settings.plane_points ** (2 if experts > 1 else 1) * points * _ranges(node)
    if node.stage == "activations":  # on each expert's timesteps: the base, the expert, and the merged model
        return (2 + ("merged" in node.parents)) * points * experts
    return 0.0


def _ranges(node: Node) -> int:
    """Ranges that a stage takes the fixed-noise loss in."""
    ranges = node.key.settings.get("ranges", ())
    assert isinstance(ranges, Sequence)
    return len(ranges)


def _loss_points(recipe: Recipe, split: SplitName) -> int:
    """Images x draws of the fixed-noise loss in one range; 0 where nobody knows how many images there are."""
    loss, held = recipe.evaluate.loss, split_images(recipe, split)
    count = held if loss.num_images is None else min(loss.num_images, held or loss.num_images)
    return (count or 0) * loss.draws


def trained_by(recipe: Recipe, node: Node) -> TrainSettings:
    """The settings of a training."""
    settings: PretrainSettings | TrainSettings = recipe.pretrain if node.stage == "pretrain" else recipe.decouple
    return settings


def has_teacher(recipe: Recipe, node: Node) -> bool:
    """Whether a training holds a frozen second model."""
    return node.stage == "decouple" and recipe.decouple.consistency_weight > 0


# -- images ---------------------------------------------------------------------------------------


def data_images(recipe: Recipe) -> int | None:
    """How many images the recipe's data hold; None where that is known only once they are here."""
    data = recipe.data
    if data.source == "digits":
        return DIGITS
    splits: dict[str, int] = known()["data"].get(data.path, {}).get("images", {}) if data.source == "hub" else {}
    names = data.split.split("+")
    total = sum(splits[name] for name in names) if all(name in splits for name in names) else None
    return total if data.max_images is None else min(data.max_images, total or data.max_images)


def split_images(recipe: Recipe, split: SplitName) -> int | None:
    """Images of one split, about: the splits are cut by hash."""
    data, total = recipe.data, data_images(recipe)
    held = {"report": data.report_fraction, "search": data.search_fraction}
    return None if total is None else round(total * held.get(split, 1 - sum(held.values())))


def _featured(recipe: Recipe, node: Node) -> int:
    split, count = node.arguments["split"], node.arguments["count"]
    if split is None:
        return recipe.evaluate.num_images
    held = (split_images(recipe, split) or 0) * recipe.data.views
    return min(count, held) if count else held


# -- disk, memory, downloads ----------------------------------------------------------------------


def disk(graph: Graph, nodes: Iterable[Node], cost: Cost) -> dict[str, int]:
    """Bytes by kind: what the stages leave, and at most `jobs` trainings' checkpoints on the way."""
    recipe, used = graph.recipe, dict.fromkeys(("data", "weights", "checkpoints", "images", "features", "other"), 0)
    weights = FLOAT * cost.parameters
    for node in nodes:
        if node.stage in ("decouple", "pretrain"):
            used["weights"] += 2 * weights  # averaged and raw
            used["checkpoints"] = max(used["checkpoints"], recipe.runtime.jobs * _checkpoints(recipe, node, weights))
        elif node.stage in ("merge", "fisher"):
            used["weights"] += weights
        elif node.stage == "sample":
            used["images"] += recipe.evaluate.num_images * prod(cost.shape)
        elif node.stage == "trajectory":
            used["images"] += MODELS_SHOWN * recipe.analyze.trajectory_images * min(prod(cost.shape), TILE)
        elif node.stage == "data":
            used["data"] += _stored_pixels(recipe, cost) + _copied(recipe)
        elif node.stage == "features":
            used["features"] += FLOAT * _featured(recipe, node) * (feature_width(recipe) + _classes(recipe))
        else:
            used["other"] += SMALL
    return used


def _stored_pixels(recipe: Recipe, cost: Cost) -> int:
    """Prepared images, where they fit into the cache; those that are cropped at random are longer than wide."""
    stored = (data_images(recipe) or 0) * prod(cost.shape)
    return stored if stored <= recipe.runtime.cache_images_gb * 1e9 else 0


def _copied(recipe: Recipe) -> int:
    """The copy of the hub's files that the data library makes to read them by row; a stream has none."""
    hub = recipe.data.source == "hub" and not recipe.data.streaming
    return int(known()["data"].get(recipe.data.path, {}).get("bytes") or 0) if hub else 0


def _checkpoints(recipe: Recipe, node: Node, weights: int) -> int:
    """Weights, their average and Adam's two moments, the best so far; a new one is whole before an old one goes."""
    settings = trained_by(recipe, node)
    copies = 3 + settings.use_ema + (settings.keep == "best")
    return weights * copies * (recipe.runtime.checkpoints_total_limit + 1)


def _classes(recipe: Recipe) -> int:
    """Class logits kept beside an image's features; a classifier's own are few."""
    return int(known()["inception"]["classes"]) if recipe.extractor.kind == "inception" else 0


def feature_width(recipe: Recipe) -> int:
    """Numbers that the extractor makes of an image; of a transformers model a usual width."""
    widths = {"inception": known()["inception"]["features"], "transformers": 768}
    return int(widths.get(recipe.extractor.kind, recipe.extractor.features))


def memory(graph: Graph, nodes: Iterable[Node], cost: Cost) -> dict[str, int]:
    """Bytes on the device, the largest stage of each kind: weights, gradients, Adam, average, teacher, activations."""
    recipe, most = graph.recipe, {"training": 0, "sampling": 0, "figures": 0}
    for node in nodes:
        if node.stage in ("decouple", "pretrain"):
            most["training"] = max(most["training"], _training_memory(recipe, node, cost))
        elif node.stage == "similarity":  # the base, a copy, the gradients of a batch and of a bin
            activations = cost.checkpointed if recipe.runtime.gradient_checkpointing else cost.kept
            needed = 4 * FLOAT * cost.parameters + activations * min(recipe.decouple.train_batch_size, COMPARED)
            most["training"] = max(most["training"], needed)
        elif node.stage in ("sample", "search"):
            served = node.arguments.get("served")
            experts = len(served.parts) if served and served.ensemble else 1
            weights = FLOAT * cost.parameters * min(experts, recipe.runtime.resident_experts)
            most["sampling"] = max(most["sampling"], weights + cost.peak * recipe.runtime.sample_batch_size)
        elif node.stage in FIGURES and node.stage != "vectors":
            needed = HELD * FLOAT * cost.parameters + cost.peak * recipe.runtime.sample_batch_size
            most["figures"] = max(most["figures"], needed)
    return most


def _training_memory(recipe: Recipe, node: Node, cost: Cost) -> int:
    settings, runtime = trained_by(recipe, node), recipe.runtime
    moments = 2 if settings.use_8bit_adam else 8
    averaged = FLOAT if settings.use_ema and not runtime.offload_ema else 0
    held = FLOAT if recipe.decouple.teacher_dtype == "float32" or recipe.decouple.teacher == "ema" else 2
    teacher = held if has_teacher(recipe, node) else 0
    activations = cost.checkpointed if runtime.gradient_checkpointing else cost.kept
    nash = node.stage == "decouple" and recipe.decouple.multi_task == "nash"
    clusters = FLOAT * recipe.decouple.multi_task_clusters if nash else 0  # a gradient each
    per_parameter = 2 * FLOAT + moments + averaged + teacher + clusters
    return per_parameter * cost.parameters + activations * settings.train_batch_size


def downloads(graph: Graph) -> list[dict[str, Any]]:
    """What must be fetched first: kind, name, bytes (None: unknown) and what to know of it."""
    recipe, found = graph.recipe, []
    if isinstance(graph.base, Input) and graph.base.path is None:
        found.append(_download("model", graph.base, known()["models"].get(recipe.model.pretrained, {})))
    if recipe.data.source == "hub" and not is_cached(str(recipe.data.path), graph.source.commit, kind="datasets"):
        found.append(_download("data", graph.source, known()["data"].get(recipe.data.path, {})))
    if isinstance(graph.extractor, Input) and graph.extractor.path is None:
        inception = known()["inception"] if recipe.extractor.kind == "inception" else {}
        found.append(_download("extractor", graph.extractor, inception))
    return found


def _download(kind: str, what: Input, facts: Mapping[str, Any]) -> dict[str, Any]:
    note = PICKLED if facts.get("pickled") else ""
    return {"kind": kind, "name": what.label, "bytes": facts.get("bytes"), "note": note}
