"""What is wrong with a search, known before any training. No torch."""

from __future__ import annotations

import math
from typing import Any

from deme_diffusion.config import MergeSettings
from deme_diffusion.errors import UserError
from deme_diffusion.merging.search.proposals import always
from deme_diffusion.merging.search.sampled import check_package

DERIVED = ("least_squares", "gradient")
"""Searches that need to know how the merged weights depend on w."""
SAMPLED = ("cma_es", "tpe")
"""Searches that go on until the budget."""
_FORM = ("ridge", "gauss_newton_rounds", "bounds")
_SHAPES = {
    "none": (),
    "grid": ("grid_values", "bounds"),
    "least_squares": (*_FORM, "scales"),
    "gradient": (*_FORM, "start", "granularity", "max_evaluations"),
    "cma_es": (*_FORM, "start", "sigma", "max_evaluations"),
    "tpe": (*_FORM, "start", "max_evaluations"),
}


def shaping(settings: MergeSettings) -> dict[str, Any]:
    """The settings, other than their defaults, that shape what a search finds: for its stage's key."""
    names = {"search", "num_images", "sampler", *_SHAPES[settings.search]}
    if settings.start != "least_squares" and settings.search not in DERIVED[:1]:
        names -= {"ridge", "gauss_newton_rounds"}
    if settings.search == "gradient":
        names |= {"gradient_steps", "gradient_learning_rate", "gradient_batch_size"}
    if settings.search in DERIVED:
        names |= {"objective"} if settings.objective == "relative_loss" else set()  # they take the loss for fd
    elif settings.search != "none":
        names |= {"objective", "finalists"} if settings.objective != "fd" else set()
    return {key: value for key, value in settings.changed().items() if key in names}


def reserved(num_experts: int, settings: MergeSettings) -> int:
    """Evaluations by FD that every search ends with, beside those that it makes."""
    judged = settings.objective != "fd" and settings.search not in (*DERIVED, "none")
    return len(list(always(num_experts))) + (settings.finalists if judged else 0)


def needed(num_experts: int, settings: MergeSettings) -> int:
    """Evaluations of a search as far as they are known: those of one that goes on until the budget, at the least.

    The closed form's N + 1 forward passes a point count only where further rounds of it follow.
    """
    rounds = settings.gauss_newton_rounds * (num_experts + 3)
    rounds += num_experts + 1 if rounds else 0
    own: dict[str, int] = {
        "grid": len(settings.grid_values) ** num_experts,
        "least_squares": len(settings.scales) + rounds,
        "gradient": 5,
        "cma_es": 1 + 4 + int(3 * math.log(max(2, num_experts))),
        "tpe": 1,
    }
    return reserved(num_experts, settings) + own.get(settings.search, 0)


def check_evaluations(num_experts: int, settings: MergeSettings) -> None:
    """Raises UserError when a search would score more candidates than `max_evaluations`: known before any training."""
    if (count := needed(num_experts, settings)) > settings.max_evaluations:
        raise UserError(
            f"merge.search {settings.search}: {count} candidates for {num_experts} experts, more than "
            f"merge.max_evaluations={settings.max_evaluations}; use fewer grid_values or scales, or raise the limit"
        )


def check_search(num_experts: int, settings: MergeSettings, method: str = "task_arithmetic") -> None:
    """Raises UserError for a search that cannot be made: its method, its package, its budget."""
    if settings.search in DERIVED and method != "task_arithmetic":
        raise UserError(
            f"merge.search {settings.search}: it needs derivatives, which are known for method task_arithmetic, not "
            f"{method}; use cma_es, tpe or grid"
        )
    check_package(settings.search)
    check_evaluations(num_experts, settings)
