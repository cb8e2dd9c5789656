"""From what a search proposes to its answer: each candidate once, finalists, scores, the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deme_diffusion.config import MergeSettings
from deme_diffusion.merging.search.checks import DERIVED, check_evaluations
from deme_diffusion.merging.search.closed_form import least_squares
from deme_diffusion.merging.search.descent import gradient
from deme_diffusion.merging.search.objective import Candidate, Objective, Trial
from deme_diffusion.merging.search.proposals import always, grid
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
    """All that FD will judge, each point once: what is always tried, then the search's own.

    `loss` is the fixed-noise loss with its derivatives, `objective` what `merge.objective` names (the loss, where it is
    not given). Raises UserError above `max_evaluations`.
    """
    check_evaluations(num_experts, settings)
    space = space or Space(num_experts, settings.bounds)
    proposals = list(always(num_experts))
    if space.default is not None:
        proposals.append(Candidate(list(space.default), "the method's own"))
    own = _once(list(proposed(settings, loss, objective or loss, space, seed)), proposals)
    return _once(proposals) + _finalists(own, settings, objective or loss)


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
    """The best by an objective other than FD; with FD itself all of them, scored as they were proposed."""
    if settings.objective == "fd" or settings.search in (*DERIVED, "none"):
        return proposals
    asked = objective()
    values = [float(asked.value(c.merge_weights)) for c in proposals]
    order = sorted(range(len(values)), key=lambda i: values[i] if math.isfinite(values[i]) else math.inf)
    return [proposals[i] for i in order[: settings.finalists]]


def _once(proposals: list[Candidate], known: Sequence[Candidate] = ()) -> list[Candidate]:
    """Each point once, by whom it was proposed first; none of those that are known."""
    unique = {_point(c): c for c in reversed([*known, *proposals])}
    return [c for c in proposals if unique[_point(c)] is c]


def _point(candidate: Candidate) -> tuple[Any, ...]:
    return (tuple(candidate.weights), tuple(candidate.rules.items()))


def score(proposals: Sequence[Candidate], objective: Objective) -> Iterator[Trial]:
    """Each candidate with its value, as they come."""
    for proposal in proposals:
        value = objective.value(proposal.merge_weights)
        yield Trial(proposal.weights, proposal.source, value, proposal.rules)


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of least value; of equals the first, so that w = 0 wins a tie."""
    return min(trials, key=lambda trial: trial.value)
