"""What the stages of a graph need of a machine's arithmetic: FLOPs. No torch, no network."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from deme_diffusion.config import FIGURES, PretrainSettings, Recipe, SamplerSettings, TrainSettings
from deme_diffusion.data.sources import WORDINGS, WORDS, SplitName
from deme_diffusion.division import reported, whole
from deme_diffusion.merging.search import Space, expected
from deme_diffusion.pipeline import caching
from deme_diffusion.pipeline.base_cost import base_cost, folder_configs, known_configs, rough_cost
from deme_diffusion.pipeline.cost_parts import Cost
from deme_diffusion.pipeline.encoder_cost import clip_cost
from deme_diffusion.pipeline.facts import known
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.unet_cost import unet_cost

DIGITS = 1797
GUIDANCE = {"stable_diffusion": 7.5, "stable_diffusion_xl": 5.0, "dit": 4.0, "stable_diffusion_3": 7.0, "wan": 5.0}
"""What the stock pipelines guide by; Flux is told its guidance, and answers once."""


def model_cost(graph: Graph) -> Cost | None:
    """The base's cost: from the recipe, its config, or what is known of its hub name; None where nothing is."""
    recipe = graph.recipe
    if isinstance(graph.base, Node):
        unet = recipe.pretrain.unet
        return unet_cost({**unet.model_dump(), "out_channels": unet.in_channels})
    if graph.base.path is None:
        known_ones = known_configs(str(recipe.model.pretrained))
        return base_cost(recipe.model, known_ones) if known_ones else None
    configs = folder_configs(graph.base.path)
    return base_cost(recipe.model, configs) or rough_cost(recipe.model, graph.base.path, configs)


def flops(graph: Graph, node: Node, cost: Cost) -> float:
    """FLOPs of one stage. What reading images, merging and timing cost is left out: it is little."""
    recipe = graph.recipe
    if node.stage in ("decouple", "pretrain"):
        return _trained(graph, node, cost) + _validated(graph, node) * _asked_once(recipe, cost)
    if node.stage == "search":
        return _searched(recipe, node, cost)
    if node.stage == "fisher":
        return 3 * int(node.arguments["samples"]) * cost.flops  # forward and backward
    if node.stage == "similarity":
        return 3 * _bins(graph, node) * recipe.similarity.num_images * cost.flops
    if node.stage == "trajectory":
        sampler = recipe.analyze.sampler or recipe.evaluate.samplers[0]
        return node.images / sampler.num_inference_steps * _sampled(recipe, sampler, cost)
    if node.stage in FIGURES:
        return cost.flops * _figured(recipe, node)
    if node.stage in ("features", "clip_score"):
        return _extracted(recipe, node) if node.stage == "features" else _scored(recipe)
    if node.stage == "cache":
        return _cached(recipe, cost)
    if node.stage == "sample":
        return _sampled(recipe, node.arguments["sampler"], cost) * recipe.evaluate.num_images
    return _loss_points(recipe, "report") * _ranges(node) * _asked_once(recipe, cost)


# -- training -------------------------------------------------------------------------------------


def _trained(graph: Graph, node: Node, cost: Cost) -> float:
    """Forward passes: 3 an image for student and gradient, one for the teacher, one for checkpointed activations.

    The gradient of a LoRA costs about as much as a forward pass: that of the base's own weights is not taken.
    """
    recipe, settings = graph.recipe, trained_by(graph.recipe, node)
    passes: float = 2 if is_lora(recipe, node) else 3
    passes += has_teacher(recipe, node) + recipe.runtime.gradient_checkpointing
    samples = node.steps * settings.train_batch_size * settings.gradient_accumulation_steps
    return samples * (passes * cost.flops + _encoded_anew(recipe, cost))


def _encoded_anew(recipe: Recipe, cost: Cost) -> float:
    """FLOPs of encoding an image and its caption, where nothing was encoded beforehand."""
    around = cost.encoders
    return 0.0 if around is None or caching.kept(recipe) else around.encode + around.caption


def _asked_once(recipe: Recipe, cost: Cost) -> float:
    """FLOPs of one point of a loss."""
    return cost.flops + _encoded_anew(recipe, cost)


def _validated(graph: Graph, node: Node) -> float:
    everything = whole(graph.division.num_timesteps)
    ranges = len(reported(node.arguments.get("subset", everything), graph.division.num_timesteps))
    times = ceil(node.steps / trained_by(graph.recipe, node).validation_steps)
    return times * ranges * _loss_points(graph.recipe, "search")


def trained_by(recipe: Recipe, node: Node) -> TrainSettings:
    """The settings of a training."""
    settings: PretrainSettings | TrainSettings = recipe.pretrain if node.stage == "pretrain" else recipe.decouple
    return settings


def has_teacher(recipe: Recipe, node: Node) -> bool:
    """Whether a training asks a frozen model beside the student."""
    return node.stage == "decouple" and recipe.decouple.consistency_weight > 0


def is_lora(recipe: Recipe, node: Node) -> bool:
    """Whether a training leaves the base as it is, and trains a LoRA."""
    return node.stage == "decouple" and recipe.decouple.lora_rank is not None


# -- sampling -------------------------------------------------------------------------------------


def _sampled(recipe: Recipe, sampler: SamplerSettings, cost: Cost) -> float:
    """FLOPs of one image: guidance asks the model twice a step; a prompt is encoded, latents are decoded."""
    passes = answers(recipe, sampler)
    around = 0.0 if cost.encoders is None else cost.encoders.decode + passes * cost.encoders.caption
    return passes * sampler.num_inference_steps * cost.flops + around


def answers(recipe: Recipe, sampler: SamplerSettings) -> int:
    """Answers of the model that classifier-free guidance takes at a step: 2, or 1 where there is none."""
    scale = GUIDANCE.get(recipe.model.family)
    if scale is None:
        return 1
    return 2 if (scale if sampler.guidance_scale is None else sampler.guidance_scale) > 1 else 1


def _searched(recipe: Recipe, node: Node, cost: Cost) -> float:
    """Of the images that candidates are scored on, and of points of the fixed-noise loss."""
    merge, how = recipe.merge, node.arguments["how"]
    space = Space.of(how.method, int(node.arguments["experts"]), merge.bounds, fixed=how.fixed)
    points = _loss_points(recipe, "search") * _ranges(node)
    asked = expected(space, merge, min(1.0, merge.gradient_batch_size / points) if points else 1.0)
    sampled = asked.scored * merge.num_images * _sampled(recipe, merge.sampler, cost)
    return sampled + asked.losses * points * _asked_once(recipe, cost)


# -- measuring ------------------------------------------------------------------------------------


def _cached(recipe: Recipe, cost: Cost) -> float:
    around = cost.encoders
    if around is None:
        return 0.0
    return cached_images(recipe) * around.encode + cached_captions(recipe) * around.caption


def cached_images(recipe: Recipe) -> int:
    """Views of images that a cache holds."""
    views = caching.stored_views(recipe)
    return sum((split_images(recipe, split) or 0) * count for split, count in views.items())


def cached_captions(recipe: Recipe) -> int:
    """Captions that a cache holds, and '': one an image, where all of them differ."""
    if recipe.model.takes != "text":
        return 0
    digits = recipe.data.source == "digits"
    return (len(WORDS) * len(WORDINGS) if digits else data_images(recipe) or 0) + 1


def _extracted(recipe: Recipe, node: Node) -> float:
    each = float(known()["inception"]["flops"]) if recipe.extractor.kind == "inception" else 0.0
    return each * featured(recipe, node)


def _scored(recipe: Recipe) -> float:
    """Of a known CLIP, an image with its caption each."""
    facts = known()["clips"].get(recipe.clip.pretrained)
    return 0.0 if facts is None else recipe.evaluate.num_images * clip_flops(facts)


def clip_flops(facts: dict[str, Any]) -> float:
    """Of an image with its caption, by the config of a CLIP."""
    return clip_cost(facts["text_config"], facts["vision_config"], facts["projection_dim"])[1]


def featured(recipe: Recipe, node: Node) -> int:
    """Images that features are made of."""
    if "reference" in node.arguments:
        return int(known()["references"].get(recipe.evaluate.prompts.protocol, 0))
    split, count = node.arguments["split"], node.arguments["count"]
    if split is None:
        return recipe.evaluate.num_images
    held = (split_images(recipe, split) or 0) * recipe.data.views
    return min(count, held) if count else held


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


# -- images ---------------------------------------------------------------------------------------


def data_images(recipe: Recipe) -> int | None:
    """How many images the recipe's data hold; None where that is known only once they are here."""
    data = recipe.data
    if data.source == "digits":
        return min(DIGITS, data.max_images or DIGITS)
    splits: dict[str, int] = known()["data"].get(data.path, {}).get("images", {}) if data.source == "hub" else {}
    names = data.split.split("+")
    total = sum(splits[name] for name in names) if all(name in splits for name in names) else None
    return total if data.max_images is None else min(data.max_images, total or data.max_images)


def split_images(recipe: Recipe, split: SplitName) -> int | None:
    """Images of one split, about: the splits are cut by hash."""
    data, total = recipe.data, data_images(recipe)
    held = {"report": data.report_fraction, "search": data.search_fraction}
    return None if total is None else round(total * held.get(split, 1 - sum(held.values())))
