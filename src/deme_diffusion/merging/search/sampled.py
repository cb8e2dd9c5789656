"""Searches that only need values: CMA-ES and TPE, from packages of their own (`deme-diffusion[search]`)."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from deme_diffusion.config import MergeSettings
from deme_diffusion.errors import UserError
from deme_diffusion.merging.search.objective import Array, Candidate, value_of
from deme_diffusion.merging.search.space import Space
from deme_diffusion.merging.search.start import start
from deme_diffusion.rng import seed_of

log = logging.getLogger(__name__)
PACKAGES = {"cma_es": "cmaes", "tpe": "optuna"}
"""The package that a search comes from."""


def check_package(search: str) -> None:
    """Raises UserError when the package of a search is not installed."""
    package = PACKAGES.get(search)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"merge.search {search} needs the package {package}; pip install 'deme-diffusion[search]'")


def cma_es(objective: Any, loss: Any, space: Space, settings: MergeSettings, seed: int) -> Iterator[Candidate]:
    """CMA-ES (Hansen and Ostermeier 2001) with first deviation `sigma`, until the budget or its own end; every point.

    The package is `cmaes` itself: optuna's sampler of that name wants an interval for every weight.
    """
    check_package("cma_es")
    first = start(loss, space, settings).reshape(-1)
    optimizer = importlib.import_module("cmaes").CMA(
        mean=_padded(first),
        sigma=settings.sigma,
        bounds=None if space.bounds is None else np.tile(space.bounds, (max(2, len(first)), 1)),
        seed=seed_of(seed, "cma_es") % 2**32,
    )
    begun = space.candidate(first, "cma_es")
    if objective.affords(1) and value_of(objective, begun) < math.inf:
        yield begun
    while objective.affords(optimizer.population_size) and not optimizer.should_stop():
        told: list[tuple[Array, float]] = []
        for _ in range(optimizer.population_size):
            point = optimizer.ask()
            candidate = space.candidate(point[: len(first)], "cma_es")
            told.append((point, value_of(objective, candidate)))
            if told[-1][1] < math.inf:
                yield candidate
        optimizer.tell(told)
        log.info("cma_es: generation %d, best %.6g", optimizer.generation, min(value for _, value in told))


def tpe(objective: Any, loss: Any, space: Space, settings: MergeSettings, seed: int) -> Iterator[Candidate]:
    """Tree-structured Parzen estimator (Bergstra et al. 2011) of optuna within an interval, until the budget."""
    check_package("tpe")
    first = start(loss, space, settings).reshape(-1)
    intervals = [space.bounds or (w - 1.0, w + 1.0) for w in map(float, first)]
    if space.bounds is None:
        log.info("tpe: it needs an interval and merge.bounds is null; each weight is sought within 1 of %s", first)
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own = seed_of(seed, "tpe") % 2**32
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=own, multivariate=True))
    study.enqueue_trial({f"w{i}": float(w) for i, w in enumerate(first)})
    begun = space.candidate(first, "tpe")
    if objective.affords(1) and value_of(objective, begun) < math.inf:
        yield begun
    while objective.affords(1):
        trial = study.ask()
        point = np.array([trial.suggest_float(f"w{i}", *interval) for i, interval in enumerate(intervals)])
        candidate = space.candidate(point, "tpe")
        value = value_of(objective, candidate)
        study.tell(trial, min(value, 1e308))
        if value < math.inf:
            yield candidate


def _padded(point: Array) -> Array:
    """CMA-ES of one dimension alone is refused by the package: a second one stands beside, which nothing depends on."""
    return point if len(point) > 1 else np.append(point, point)
