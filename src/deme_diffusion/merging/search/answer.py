"""From what a search proposes to its answer: each candidate once, finalists, scores, the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deme_diffusion.config import MergeSettings
from deme_diffusion.errors import UserError
from deme_diffusion.merging.search.checks import check_evaluations
from deme_diffusion.merging.search.closed_form import least_squares
from deme_diffusion.merging.search.costs import judges, tried
from deme_diffusion.merging.search.descent import gradient
from deme_diffusion.merging.search.objective import Candidate, Objective, Trial, value_of
from deme_diffusion.merging.search.proposals import grid
from deme_diffusion.merging.search.sampled import cma_es, tpe
from deme_diffusion.merging.search.space import Space

Asked = Callable[[], Any]
"""Makes a journal, or any objective of the kind that a search wants; called only by those that ask it."""


def candidates(
    num_experts: int,
    settings: MergeSettings,
    loss: Asked,
    objective: Asked | None = None,
    *,
    space: Space | None = None,
    seed: int = 0,
) -> list[Candidate]:
    """All that FD will judge, each model once: what is always tried, then the search's own.

    `loss` is the fixed-noise loss with its derivatives, `objective` what `merge.objective` names (the loss, where it is
    not given). Raises UserError above `max_evaluations`.
    """
    space = space or Space(num_experts, settings.bounds)
    check_evaluations(space, settings)
    known = tried(space)
    own = space.once(list(proposed(settings, loss, objective or loss, space, seed)), known)
    return known + _finalists(own, settings, objective or loss)


def proposed(settings: MergeSettings, loss: Asked, objective: Asked, space: Space, seed: int) -> Iterator[Candidate]:
    """What the search itself proposes, as it does so."""
    if settings.search == "grid":
        yield from grid(space.num_experts, settings)
    elif settings.search == "least_squares":
        yield from least_squares(loss(), space, settings)
    elif settings.search == "gradient":
        yield from gradient(loss(), space, settings)
    elif settings.search == "cma_es":
        yield from cma_es(objective(), loss(), space, settings, seed)
    elif settings.search == "tpe":
        yield from tpe(objective(), loss(), space, settings, seed)


def _finalists(proposals: list[Candidate], settings: MergeSettings, objective: Asked) -> list[Candidate]:
    """The best by an objective other than FD, if it is a number; with FD all of them, scored as they were proposed."""
    if not judges(settings):
        return proposals
    asked = objective()
    values = [value_of(asked, candidate) for candidate in proposals]
    order = sorted((i for i, value in enumerate(values) if value < math.inf), key=values.__getitem__)
    return [proposals[i] for i in order[: settings.finalists]]


def score(proposals: Sequence[Candidate], objective: Objective) -> Iterator[Trial]:
    """Each candidate with its value, as they come; one that makes no model, or no number, with the reason."""
    for proposal in proposals:
        reason = ""
        try:
            value = float(objective.value(proposal.merge_weights))
        except UserError as error:
            value, reason = math.inf, str(error)
        yield Trial(proposal.weights, proposal.source, value, proposal.rules, reason)


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of least value; of equals the first, so that w = 0 wins a tie."""
    return min(trials, key=lambda trial: trial.value if math.isfinite(trial.value) else math.inf)
