"""What is wrong with a search, known before any training. No torch."""

from __future__ import annotations

from typing import Any

from deme_diffusion.config import MergeSettings
from deme_diffusion.errors import UserError
from deme_diffusion.merging.search.costs import (
    DERIVED,
    SAMPLED,
    asks_loss,
    expected,
    judges,
    needed,
    starts_at_least_squares,
)
from deme_diffusion.merging.search.sampled import check_package
from deme_diffusion.merging.search.space import Space
from deme_diffusion.merging.table import method as method_named

FEW_IMAGES, FEW_CANDIDATES = 1000, 20
"""Below so many images, and above so many candidates, the least FD found is that of the luckiest candidate."""
_FORM = ("ridge", "gauss_newton_rounds", "bounds")
_SHAPES = {
    "none": (),
    "grid": ("grid_values", "bounds"),
    "least_squares": (*_FORM, "scales"),
    "gradient": (*_FORM, "start", "granularity", "max_evaluations"),
    "cma_es": (*_FORM, "start", "sigma", "max_evaluations"),
    "tpe": (*_FORM, "start", "max_evaluations"),
}


_FEWER = {
    "grid": "use fewer grid_values",
    "least_squares": "use fewer scales or gauss_newton_rounds",
    "gradient": "use start=zero",
    "cma_es": "use start=zero",
    "tpe": "use start=zero",
}


def shaping(settings: MergeSettings, method: str = "task_arithmetic") -> dict[str, Any]:
    """The settings, other than their defaults, that shape what a search finds: for its stage's key."""
    names, space = {"search", "num_images", "sampler", *_SHAPES[settings.search]}, _space(1, settings, method)
    if settings.search != "least_squares" and not starts_at_least_squares(space, settings):
        names -= {"ridge", "gauss_newton_rounds"}
    if space.default is not None and settings.start != "zero":
        names -= {"start"}  # the method's own weights, whatever it says
    if settings.search == "gradient":
        names |= {"gradient_steps", "gradient_learning_rate", "gradient_batch_size"}
    if settings.search in DERIVED:
        names |= {"objective"} if settings.objective == "relative_loss" else set()  # they take the loss for fd
    elif settings.search != "none":
        names |= {"objective", "finalists"} if settings.objective != "fd" else set()
    names.add("judge")
    return {key: value for key, value in settings.changed().items() if key in names}


def shaped_by_loss(settings: MergeSettings, method: str = "task_arithmetic") -> bool:
    """Whether the settings of the fixed-noise loss shape what a search finds."""
    return asks_loss(_space(1, settings, method), settings)


def _space(num_experts: int, settings: MergeSettings, method: str, *, fixed: bool = False) -> Space:
    return Space.of(method_named(method), num_experts, settings.bounds, fixed=fixed)


def judged(num_experts: int, settings: MergeSettings) -> int:
    """Candidates that FD judges, and chooses from, at most."""
    space = Space(num_experts, settings.bounds)
    if settings.search in SAMPLED and not judges(settings):
        return settings.max_evaluations
    return expected(space, settings).scored


def noise_warning(num_experts: int, settings: MergeSettings) -> str | None:
    """What to say of a search that chooses the least of many FDs on few images; None of others."""
    if settings.search == "none" or settings.num_images >= FEW_IMAGES:
        return None
    if (count := judged(num_experts, settings)) <= FEW_CANDIDATES:
        return None
    judged_on = f"{settings.judge.upper()} on {settings.num_images} images"
    return (
        f"merge.num_images={settings.num_images}: {judged_on} follows the sampling noise, and "
        f"merge.search={settings.search} chooses the least of up to {count}; use {FEW_IMAGES} images or more, or an "
        "objective other than fd"
    )


def check_evaluations(space: Space, settings: MergeSettings) -> None:
    """Raises UserError when a search needs more evaluations than `max_evaluations`: known before any training."""
    if (count := needed(space, settings)) > settings.max_evaluations:
        what = "candidates" if settings.search in ("none", "grid") else "evaluations"
        fewer = f"{_FEWER[settings.search]}, or raise" if settings.search in _FEWER else "raise"
        if settings.search in _FEWER and "start" in fewer and not starts_at_least_squares(space, settings):
            fewer = "raise"
        raise UserError(
            f"merge.search {settings.search}: {count} {what} for {space.num_experts} experts, more than "
            f"merge.max_evaluations={settings.max_evaluations}; {fewer} the limit"
        )


def check_search(
    num_experts: int, settings: MergeSettings, method: str = "task_arithmetic", *, fixed: bool = False
) -> None:
    """Raises UserError for a search that cannot be made: its method, its package, its budget."""
    if settings.search in DERIVED and method != "task_arithmetic":
        raise UserError(
            f"merge.search {settings.search}: it needs derivatives, which are known for method task_arithmetic, not "
            f"{method}; use cma_es, tpe or grid, or merge.search=none with merge.weights"
        )
    if settings.granularity != "model" and settings.search != "gradient":
        raise UserError(
            f"merge.granularity={settings.granularity}: merge.search={settings.search} has one weight an expert for "
            "the whole model; use merge.search=gradient, or leave granularity out"
        )
    check_package(settings.search)
    check_evaluations(_space(num_experts, settings, method, fixed=fixed), settings)
