"""Whether a run can be played with, and what the sliders stand for: known before a model is loaded. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from deme_diffusion.config import SamplerSettings
from deme_diffusion.division import name_of
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.samplers import check_sampler
from deme_diffusion.pipeline import merges
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run
from deme_diffusion.recipes import RESOLVED, load

BOUNDS = (-0.5, 1.5)
"""Of the sliders, where the recipe bounds no weight."""
MOST_RUNS = 50
"""Of a subset that is drawn as a bar."""
STOCK = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
"""Samplers that are offered beside the recipe's own."""


def how_of(graph: Graph) -> merges.HowToMerge:
    """How the recipe merges; where it serves the ensemble, task arithmetic."""
    return merges.how(graph.recipe.merge, graph.recipe.decouple.num_ranges)


def parts_of(graph: Graph) -> list[Node | Input]:
    """What a merge reads: base, experts and, where the method needs them, their Fisher information."""
    seed = graph.recipe.seeds[0]
    experts = graph.experts[seed]
    return [graph.base, *experts, *graph.informed(how_of(graph), experts, seed).values()]


def check_ready(run: Run, words: Sequence[str]) -> None:
    """Raises UserError unless base and experts are done; `words` are the command that makes them."""
    if run.graph.waits(run.graph.experts[run.recipe.seeds[0]]):
        again = _first(run, words)
        raise UserError(f"{run.folder}: the gradients that its division is made by are not compared; first: {again}")
    parts = parts_of(run.graph)
    fetched = [part.label for part in parts if isinstance(part, Input) and part.path is None]
    undone = [part.label for part in parts if isinstance(part, Node) and run.store.status(part.key) != "done"]
    if missing := [*fetched, *undone]:
        count = f"{len(missing)} of the {len(parts)} models that are merged are" if len(missing) > 1 else "a model is"
        raise UserError(f"{run.folder}: {count} not there ({', '.join(missing)}); first: {_first(run, words)}")


def _first(run: Run, words: Sequence[str]) -> str:
    """What to run before: elsewhere, where the folder holds another recipe, which `deme run` would refuse."""
    if not _holds_another(run):
        return shlex.join(words)
    folders = (run.folder.with_name(f"{run.folder.name}-{i}") for i in count(2))
    out = str(next(folder for folder in folders if not folder.exists()))
    plain = list(words[: words.index("--out")] if "--out" in words else words)
    return f"{shlex.join([*plain, '--out', out])}, then: {shlex.join(['deme', 'play', out])}"


def _holds_another(run: Run) -> bool:
    """Whether the run's folder holds a recipe of other models."""
    if not (run.folder / RESOLVED).exists():
        return False
    with suppress(UserError):
        there, beside = load(str(run.folder), as_it_stands=True).recipe, {"runtime", "analyze"}
        return there.model_dump(mode="json", exclude=beside) != run.recipe.model_dump(mode="json", exclude=beside)
    return True


def samplers(graph: Graph) -> dict[str, SamplerSettings]:
    """Label -> sampler: the recipe's own, then stock ones with as many steps that the model's schedule allows."""
    listed, family = graph.recipe.evaluate.samplers, graph.recipe.model.family
    offered = {sampler.label: sampler for sampler in listed}
    for name in STOCK:
        stock = SamplerSettings(name=name, num_inference_steps=listed[0].num_inference_steps)
        if all(stock != own for own in listed) and _fits(stock, graph.division.num_timesteps, family):
            offered[name.removesuffix("Scheduler")] = stock
    return offered


def _fits(sampler: SamplerSettings, num_timesteps: int, family: str) -> bool:
    try:
        check_sampler(sampler, num_timesteps, key="sampler", family=family)
    except UserError:
        return False
    return True


def sampler_of(graph: Graph, label: str, steps: int) -> SamplerSettings:
    """One of the samplers that are offered, with so many steps. Raises UserError for another, or too many steps."""
    offered = samplers(graph)
    if label not in offered:
        raise UserError(f"sampler: {label!r}; there are {', '.join(offered)}")
    sampler = offered[label].model_copy(update={"num_inference_steps": steps})
    check_sampler(sampler, graph.division.num_timesteps, key="sampler", family=graph.recipe.model.family)
    return sampler


def experts(graph: Graph, colours: tuple[str, ...]) -> list[dict[str, Any]]:
    """What each slider is labelled by: the expert, its timesteps in words and, where they are few runs, as runs."""
    told = []
    for i in range(graph.division.num_experts):
        runs = graph.division.subset(i)
        drawn = runs if len(runs) <= MOST_RUNS else []
        colour = colours[i % len(colours)]
        told.append({"name": f"expert {i}", "range": name_of(runs), "runs": drawn, "colour": colour})
    return told
