"""What must change along with a setting so that the recipe stays valid, and whether the result can be run. No torch."""

from __future__ import annotations

from typing import Any

from deme_diffusion.ablate.rows import Change
from deme_diffusion.config import Recipe
from deme_diffusion.config.recipe import NO_LORA
from deme_diffusion.evaluation.samplers import check_sampler
from deme_diffusion.merging.search import check_search
from deme_diffusion.merging.search.costs import DERIVED
from deme_diffusion.merging.table import METHODS
from deme_diffusion.pipeline import merges
from deme_diffusion.recipes import changed

_DIVIDING = frozenset(f"decouple.{name}" for name in ("division", "overlap", "division_seed", "edges"))


def completed(recipe: Recipe, change: Change) -> dict[str, Any]:
    """The change with what goes with it: `edges` go with their division, weights with their number of experts.

    Only settings that the recipe has otherwise are added, so that an arm differs by the stated change and no more.
    """
    result = dict(change)
    for rule in (_ranges, _training, _lora, _method, _search):
        for path, value in rule(recipe, result).items():
            if path not in result and _now(recipe, path) != value:
                result[path] = value
    return result


def _now(recipe: Recipe, path: str) -> Any:
    section, _, name = path.partition(".")
    return recipe.model_dump(mode="json")[section][name]


def _ranges(recipe: Recipe, change: Change) -> Change:
    """Values a range go with their number, edges with their division; one model is merged with nothing."""
    settings, added = recipe.decouple, dict[str, Any]()
    count = change.get("decouple.num_ranges", settings.num_ranges)
    if count != settings.num_ranges:
        added |= {"decouple.range_steps": None, "decouple.range_learning_rates": None, "merge.weights": None}
        added |= {"merge.weights_for": {}, "merge.keep": {}}
        if settings.division == "explicit":
            added |= {"decouple.division": "uniform", "decouple.edges": None}
        if count != 1:
            added["decouple.multi_task"] = "none"
    if count == 1:
        added |= {"merge.method": "none", "merge.search": "none"}
    if change.get("decouple.division", "explicit") != "explicit":
        added["decouple.edges"] = None
    return added


def _training(recipe: Recipe, change: Change) -> Change:
    added: dict[str, Any] = {}
    if "decouple.total_steps" in change:
        added["decouple.range_steps"] = None
    if "decouple.learning_rate" in change:
        added["decouple.range_learning_rates"] = None
    if change.get("decouple.loss_weighting", "min_snr") != "min_snr":
        added["decouple.snr_gamma"] = None
    if "decouple.projection_axes" in change and recipe.decouple.projection == "none":
        added["decouple.projection"] = "residual"
    if change.get("decouple.use_ema") is False:
        added["decouple.teacher"] = "frozen"
    return added


def _lora(recipe: Recipe, change: Change) -> Change:
    """A LoRA leaves the base as it is, so that nothing else changes it; its own settings go with it."""
    if "decouple.lora_rank" not in change:
        return {}
    if change["decouple.lora_rank"] is None:
        own = {"decouple.lora_alpha": None, "decouple.lora_targets": None}
        return {**own, "merge.lora_rank": None, "merge.fuse": False}
    added: dict[str, Any] = {"decouple.projection": "none", "decouple.projection_axes": "channel"}
    added |= {"decouple.init": "pretrained", "decouple.teacher": "frozen", "decouple.teacher_dtype": "float32"}
    fused = recipe.model.family in NO_LORA
    return {**added, **({"merge.fuse": True} if fused else {"merge.max_shard_size": None})}


def _method(recipe: Recipe, change: Change) -> Change:
    """Options are of one method; a method without weights has no search, and two searches know task arithmetic only."""
    name = change.get("merge.method", recipe.merge.method)
    if name == "none" or name not in METHODS:
        return {}
    added: dict[str, Any] = {} if name == recipe.merge.method else {"merge.options": _no_options(recipe)}
    if not METHODS[name].weighted:
        return {**added, "merge.search": "none", "merge.weights": None, "merge.weights_for": {}}
    if name != "task_arithmetic" and change.get("merge.search", recipe.merge.search) in DERIVED:
        added["merge.search"] = "none"
    return added


def _no_options(recipe: Recipe) -> dict[str, Any]:
    return dict.fromkeys(type(recipe.merge.options).model_fields)


def _search(recipe: Recipe, change: Change) -> Change:
    """Given weights and searches exclude each other; weights finer than the model are the gradient search's."""
    added: dict[str, Any] = {}
    if change.get("merge.weights") is not None or change.get("merge.weighting", "uniform") != "uniform":
        added |= {"merge.search": "none", "merge.weighting": "uniform"}
    if "merge.weighting" in change or "merge.search" in change:
        added["merge.weights"] = None
    if "merge.search" in change:
        added["merge.weighting"] = "uniform"
    if {**added, **change}.get("merge.search", recipe.merge.search) != "gradient":
        added["merge.granularity"] = "model"
    return added


def idle(recipe: Recipe, change: Change) -> str:
    """Why a change to a (changed) recipe leaves all models as they are, if it does."""
    if recipe.decouple.num_ranges == 1 and change.get("decouple.num_ranges") != 1 and _DIVIDING & change.keys():
        return "one range has no division; set decouple.num_ranges"
    return ""


def taken_along(recipe: Recipe, change: Change, whole: Change) -> str:
    """What a reader must know of the settings that `completed` added: the search is another one as well."""
    if "merge.search" in change or "merge.search" not in whole or "merge.method" not in change:
        return ""
    if METHODS[change["merge.method"]].weighted:
        return f"its search too: {recipe.merge.search} needs task arithmetic; weights are the method's own"
    return f"its search too: {change['merge.method']} has no weights for {recipe.merge.search} to find"


def check(recipe: Recipe) -> None:
    """Raises UserError for what a run would refuse before its first stage, as far as that opens no file."""
    merges.check(recipe)
    if recipe.merge.method != "none":
        fixed = bool(recipe.merge.weights_for or recipe.merge.keep)
        check_search(recipe.decouple.num_ranges, recipe.merge, recipe.merge.method, fixed=fixed)
    for index, sampler in enumerate(recipe.evaluate.samplers):
        key, most = f"evaluate.samplers.{index}", max(1000, sampler.num_inference_steps + 1)
        check_sampler(sampler, most, key=key, family=recipe.model.family)


def applied(recipe: Recipe, change: Change) -> Recipe:
    """The changed recipe, checked. Raises UserError."""
    result = changed(recipe, change)
    check(result)
    return result
