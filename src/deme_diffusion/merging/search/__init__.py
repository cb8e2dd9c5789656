"""The search for merge weights (Sec. 3.3): proposals from an injected objective, the answer by the true metric.

Whatever the search, w = 0 (the base), uniform weights and every one-hot are scored too, so that a search cannot
return something worse, on the search split, than what needs no search. No torch.
"""

from __future__ import annotations

from deme_diffusion.merging.search.answer import best, candidates, proposed, score
from deme_diffusion.merging.search.checks import check_evaluations, check_search, noise_warning, shaped_by_loss, shaping
from deme_diffusion.merging.search.closed_form import least_squares, least_squares_weights
from deme_diffusion.merging.search.costs import Cost, expected, needed, reserved, start_cost
from deme_diffusion.merging.search.descent import gradient
from deme_diffusion.merging.search.journal import Budget, Journal, best_so_far
from deme_diffusion.merging.search.objective import (
    Array,
    Candidate,
    Differentiable,
    Given,
    Objective,
    Quadratic,
    Rules,
    Trial,
    Vector,
)
from deme_diffusion.merging.search.proposals import always, grid, uniform_weights
from deme_diffusion.merging.search.sampled import cma_es, tpe
from deme_diffusion.merging.search.space import REST, Space

__all__ = [
    "REST",
    "Array",
    "Budget",
    "Candidate",
    "Cost",
    "Differentiable",
    "Given",
    "Journal",
    "Objective",
    "Quadratic",
    "Rules",
    "Space",
    "Trial",
    "Vector",
    "always",
    "best",
    "best_so_far",
    "candidates",
    "check_evaluations",
    "check_search",
    "cma_es",
    "expected",
    "gradient",
    "grid",
    "least_squares",
    "least_squares_weights",
    "needed",
    "noise_warning",
    "proposed",
    "reserved",
    "score",
    "shaped_by_loss",
    "shaping",
    "start_cost",
    "tpe",
    "uniform_weights",
]
