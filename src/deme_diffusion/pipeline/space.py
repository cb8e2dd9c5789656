"""What the stages of a graph need of a machine's space: disk and memory. No torch, no network."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from deme_diffusion.config import FIGURES, Recipe
from deme_diffusion.data.contents import listed
from deme_diffusion.digests import size_and_time
from deme_diffusion.evaluation.protocols import protocol_of
from deme_diffusion.pipeline import caching
from deme_diffusion.pipeline.cost_parts import FLOAT, Cost
from deme_diffusion.pipeline.facts import known
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.lora_cost import adapter_parameters
from deme_diffusion.pipeline.needs import (
    answers,
    cached_captions,
    cached_images,
    data_images,
    featured,
    has_teacher,
    is_lora,
    trained_by,
)
from deme_diffusion.pipeline.node import Node, Served

BYTES = {"float32": FLOAT, "float16": 2, "bfloat16": 2}
COMPARED = 16
"""Samples at most in a batch of the stage similarity (`analysis.similarity.MOST_AT_ONCE`, which needs torch)."""
MODELS_SHOWN, TILE = 3, 3 * 128 * 128
"""Of the grids: base, ensemble and merged; the bytes of an image at most (`analysis.trajectory.SIDE`)."""
HELD = 5
"""Copies of the weights that a figure of losses holds at most: base, the point, directions and how they are made."""
HELD_ANSWERS = 2**30
"""Bytes of answers that wait in a search where one module takes all places (`evaluation.objectives`)."""
SMALL = 100_000
"""Bytes of a stage that leaves numbers only."""
COPIED = ("parquet", "webdataset")
"""Sources on this machine that `datasets` copies into its own cache."""
KINDS = ("data", "cache", "weights", "checkpoints", "images", "features", "other")


# -- disk -----------------------------------------------------------------------------------------


def disk(graph: Graph, nodes: Iterable[Node], cost: Cost) -> dict[str, int]:
    """Bytes by kind: what the stages leave, and at most `jobs` trainings' checkpoints on the way."""
    recipe, used = graph.recipe, dict.fromkeys(KINDS, 0)
    for node in nodes:
        if node.stage in ("decouple", "pretrain"):
            weights = FLOAT * trained_parameters(recipe, node, cost)
            used["weights"] += 2 * weights  # averaged and raw
            used["checkpoints"] = max(used["checkpoints"], recipe.runtime.jobs * _checkpoints(recipe, node, weights))
        elif node.stage in ("merge", "fisher"):
            used["weights"] += _merged(recipe, node, cost)
        elif node.stage == "sample":
            used["images"] += recipe.evaluate.num_images * _shown(recipe, cost)
        elif node.stage == "trajectory":
            used["images"] += MODELS_SHOWN * recipe.analyze.trajectory_images * min(prod(cost.image), TILE)
        elif node.stage == "data":
            used["data"] += _stored_pixels(recipe, cost) + _copied(recipe)
        elif node.stage == "cache":
            used["cache"] += _encoded(recipe, cost)
        elif node.stage == "features":
            used["features"] += FLOAT * featured(recipe, node) * (feature_width(recipe) + _classes(recipe))
        else:
            used["other"] += SMALL
    return used


def trained_parameters(recipe: Recipe, node: Node, cost: Cost) -> int:
    """Parameters that a training changes: all, or those of a LoRA."""
    return adapter_parameters(recipe, cost) if is_lora(recipe, node) else cost.parameters


def _merged(recipe: Recipe, node: Node, cost: Cost) -> int:
    """Bytes of a merged model (a LoRA of LoRA experts, unless they are fused), or of an expert's Fisher information."""
    merge, decouple = recipe.merge, recipe.decouple
    if decouple.lora_rank is None or merge.fuse or node.stage == "fisher":
        return (FLOAT if node.stage == "fisher" else BYTES[merge.dtype or recipe.model.dtype]) * cost.parameters
    joined = decouple.lora_rank * int(node.arguments.get("experts", decouple.num_ranges))
    return FLOAT * adapter_parameters(recipe, cost, merge.lora_rank or joined)


def _shown(recipe: Recipe, cost: Cost) -> int:
    """Bytes of an image as it is stored: a protocol reduces it."""
    protocol, (channels, *size) = protocol_of(recipe.evaluate.prompts), cost.image
    side = protocol.side if protocol and recipe.model.takes != "nothing" else None
    return channels * prod(size if side is None else [min(side, length) for length in size])


def _encoded(recipe: Recipe, cost: Cost) -> int:
    """Latents of every stored view, and the embedding of every caption with its digest."""
    each, around = BYTES[recipe.cache.dtype], cost.encoders
    text = 0 if around is None else cached_captions(recipe) * (around.condition * each + 8)
    return cached_images(recipe) * prod(cost.shape) * each + text


def _stored_pixels(recipe: Recipe, cost: Cost) -> int:
    """Prepared images, where they fit into the cache; those that are cropped at random are longer than wide."""
    stored = (data_images(recipe) or 0) * prod(cost.image)
    return stored if stored <= recipe.runtime.cache_images_gb * 1e9 else 0


def _copied(recipe: Recipe) -> int:
    """The copy of tables and shards that the data library makes to read them by row; a stream has none."""
    if recipe.data.source in COPIED:
        return sum(size_and_time(file)[0] for file in listed(recipe.data))
    hub = recipe.data.source == "hub" and not recipe.data.streaming
    return int(known()["data"].get(recipe.data.path, {}).get("bytes") or 0) if hub else 0


def copied_said(recipe: Recipe) -> str | None:
    """What to say of a local data set that is copied; None of one that is read in its place."""
    if recipe.data.source not in COPIED:
        return None
    size = _copied(recipe)
    said = f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
    return f"data: about {said} of {recipe.data.source} files are copied once into the cache of datasets (HF_HOME)"


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


# -- memory ---------------------------------------------------------------------------------------


def memory(graph: Graph, nodes: Iterable[Node], cost: Cost) -> dict[str, int]:
    """Bytes on the device, the largest stage of each kind: weights, gradients, Adam, average, teacher, activations."""
    recipe, most = graph.recipe, {"training": 0, "encoding": 0, "search": 0, "sampling": 0, "figures": 0}
    for node in nodes:
        kind, needed = _kind_of_memory(node), 0
        if kind == "training":
            needed = _compared(recipe, cost) if node.stage == "similarity" else _training(recipe, node, cost)
        elif kind == "encoding":
            needed = _encoding(recipe, cost)
        elif kind == "search":
            needed = _searching(recipe, node, cost)
        elif node.stage == "cost":
            needed = max(_sampling(recipe, served, cost, graph.served_batch) for served in node.arguments["models"])
        elif kind == "sampling":
            served = node.arguments.get("served")
            needed = _sampling(recipe, served, cost, recipe.runtime.sample_batch_size)
        elif kind == "figures":
            one = cost.peak * BYTES[recipe.model.dtype] // FLOAT
            needed = HELD * _base_bytes(recipe, cost) + one * recipe.runtime.sample_batch_size
        if kind:
            most[kind] = max(most[kind], needed)
    return most


def _kind_of_memory(node: Node) -> str | None:
    kinds = {"decouple": "training", "pretrain": "training", "similarity": "training", "cache": "encoding"}
    kinds |= {"sample": "sampling", "cost": "sampling", "trajectory": "sampling", "search": "search"}
    return kinds.get(node.stage) or ("figures" if node.stage in FIGURES and node.stage != "vectors" else None)


def _training(recipe: Recipe, node: Node, cost: Cost) -> int:
    settings, runtime, lora = trained_by(recipe, node), recipe.runtime, is_lora(recipe, node)
    moments = 2 if settings.use_8bit_adam else 8
    averaged = FLOAT if settings.use_ema and not runtime.offload_ema else 0
    nash = node.stage == "decouple" and recipe.decouple.multi_task == "nash"
    clusters = FLOAT * recipe.decouple.multi_task_clusters if nash else 0  # a gradient each
    trained = (2 * FLOAT + moments + averaged + clusters) * trained_parameters(recipe, node, cost)
    # A LoRA's teacher is the base that it is put into, of which there is one copy.
    standing = _base_bytes(recipe, cost) if lora else _teacher(recipe, node) * cost.parameters
    around = 0 if caching.kept(recipe) else _encoders(recipe, cost)
    return trained + standing + around + _kept(recipe, cost, half=lora) * settings.train_batch_size


def _teacher(recipe: Recipe, node: Node) -> int:
    """Bytes a parameter of the teacher's own copy."""
    if not has_teacher(recipe, node):
        return 0
    return FLOAT if recipe.decouple.teacher == "ema" else BYTES[recipe.decouple.teacher_dtype]


def _kept(recipe: Recipe, cost: Cost, *, half: bool) -> int:
    """Bytes that a sample's backward pass holds; `half`: they are in the base's own precision, not in float32."""
    held = cost.checkpointed if recipe.runtime.gradient_checkpointing else cost.kept
    return held * BYTES[recipe.model.dtype] // FLOAT if half else held


def _compared(recipe: Recipe, cost: Cost) -> int:
    """The base, a copy, the gradients of a batch and of a bin."""
    activations = _kept(recipe, cost, half=False)
    return 4 * FLOAT * cost.parameters + activations * min(recipe.decouple.train_batch_size, COMPARED)


def _encoding(recipe: Recipe, cost: Cost) -> int:
    """Encoders and base, and a batch of images on its way."""
    around = cost.encoders
    images = 0 if around is None else around.encode_peak * BYTES[recipe.model.encoder_dtype] // FLOAT
    return _base_bytes(recipe, cost) + _encoders(recipe, cost) + images * recipe.cache.batch_size


def _sampling(recipe: Recipe, served: Served | None, cost: Cost, batch: int) -> int:
    """The base, the served model (None: all, one after another), what is around, and a batch: denoised, or decoded."""
    parts = recipe.decouple.num_ranges if served is None else len(served.parts) if served.ensemble else 1
    weights = _base_bytes(recipe, cost) * min(parts, recipe.runtime.resident_experts)
    if recipe.decouple.lora_rank is not None:  # one base, whose adapters are switched
        weights = _base_bytes(recipe, cost) + _adapters(recipe, cost)
    return _base_bytes(recipe, cost) + weights + _encoders(recipe, cost) + _run(recipe, cost) * batch


def _searching(recipe: Recipe, node: Node, cost: Cost) -> int:
    """The most of what follows one another: base and experts on points, a gradient, a candidate's images."""
    merge, batch, base = recipe.merge, recipe.runtime.sample_batch_size, _base_bytes(recipe, cost)
    experts, lora = int(node.arguments["experts"]), recipe.decouple.lora_rank is not None
    point = cost.peak * BYTES[recipe.model.dtype] // FLOAT
    around = _encoders(recipe, cost) + batch * point
    exact = 0 if recipe.model.dtype == "float32" else FLOAT * cost.parameters  # the shell once more, for losses
    shells = base + exact if merge.objective != "fd" or merge.gauss_newton_rounds or merge.search == "gradient" else 0
    equations = (base + _adapters(recipe, cost) + HELD_ANSWERS if lora else (experts + 1) * base) + around
    if merge.gauss_newton_rounds:
        equations = max(equations, base + shells + HELD_ANSWERS + _encoders(recipe, cost) + batch * cost.peak)
    steps = 0
    if merge.search == "gradient":  # the gradient of each weight, and the sum of those of a step
        held = min(batch, recipe.decouple.train_batch_size)
        steps = base + shells + 2 * FLOAT * cost.parameters + _encoders(recipe, cost) + cost.kept * held
    judged = 2 * base + (exact if shells else 0) + _encoders(recipe, cost) + _run(recipe, cost) * batch
    asks = merge.search in ("least_squares", "gradient") or merge.start == "least_squares"
    return max(equations + shells if asks else 0, steps, judged)


def _adapters(recipe: Recipe, cost: Cost) -> int:
    """Bytes of the adapters of all experts, held in float32."""
    return FLOAT * adapter_parameters(recipe, cost) * recipe.decouple.num_ranges


def _run(recipe: Recipe, cost: Cost) -> int:
    """Bytes that an image needs at once."""
    samplers = (recipe.merge.sampler, *recipe.evaluate.samplers)
    passes = max(answers(recipe, sampler) for sampler in samplers)
    denoised = passes * cost.peak * BYTES[recipe.model.dtype] // FLOAT
    if cost.encoders is None:
        return denoised
    return max(denoised, cost.encoders.decode_peak * BYTES[recipe.model.encoder_dtype] // FLOAT)


def _base_bytes(recipe: Recipe, cost: Cost) -> int:
    return BYTES[recipe.model.dtype] * cost.parameters


def _encoders(recipe: Recipe, cost: Cost) -> int:
    return 0 if cost.encoders is None else BYTES[recipe.model.encoder_dtype] * cost.encoders.parameters
