"""The search for merge weights as a stage: its objectives on the search split, its journal, its answer by FD."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from deme_diffusion.evaluation import fisher
from deme_diffusion.evaluation.objectives import FixedNoiseObjective, FrechetObjective
from deme_diffusion.files import write_json
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.differential import Differential
from deme_diffusion.merging.search import Budget, Candidate, Given, Journal, Space, best, candidates, reserved, score
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.measure import Measuring
from deme_diffusion.pipeline.merges import HowToMerge
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.workbench import ranges_of_node, seed_of_node
from deme_diffusion.rng import seed_of

log = logging.getLogger(__name__)
SEARCH, TRIALS = "search.json", "search.jsonl"
NAMES = {"fd": "FD", "loss": "fixed-noise loss", "relative_loss": "fixed-noise loss over the base's"}
"""What an objective is called in the search's file."""


@dataclass
class Asked:
    """What a search may ask of one merger: FD and the fixed-noise loss, each behind its journal. Made when asked."""

    stages: Searching
    node: Node
    merger: Merger
    path: Path

    def __post_init__(self) -> None:
        self.settings, self.how = self.stages.recipe.merge, self.node.arguments["how"]
        self.experts: int = self.node.arguments["experts"]
        self.budget = Budget(self.settings.max_evaluations - reserved(self.experts, self.settings))
        self.seed = seed_of(seed_of_node(self.node), "search")

    @cached_property
    def shell(self) -> nn.Module:
        """The module that every candidate is loaded into."""
        return self.stages.component(self.stages.graph.base)

    def compose(self, weights: Given) -> MergeWeights:
        """With what the recipe says of some parameters."""
        given, how = MergeWeights.of(weights), self.how
        composed: MergeWeights = how.weights(given.values, given.rules)
        return composed

    def materialise(self, weights: Given) -> nn.Module:
        """The merged model."""
        return self.merger.into(self.shell, self.compose(weights))

    @cached_property
    def differential(self) -> Differential:
        """How the merged model depends on the weights."""
        return Differential(self.merger, self.shell, self.compose)

    @cached_property
    def metric(self) -> Journal:
        """FD, which judges whatever was searched by."""
        stages, settings = self.stages, self.settings
        objective = FrechetObjective(
            stages.denoiser,
            self.materialise,
            stages.splits["search"],
            stages.extractor,
            settings.sampler,
            self.seed,
            settings.num_images,
            stages.recipe.runtime.sample_batch_size,
        )
        return Journal(self.path, NAMES["fd"], objective, self.budget)

    @cached_property
    def loss(self) -> Journal:
        """The fixed-noise loss with its derivatives: relative where the recipe's objective is."""
        relative = self.settings.objective == "relative_loss"
        base, experts = self._ends()
        objective = FixedNoiseObjective(
            self.stages.fixed_noise("search", ranges_of_node(self.node)),
            base,
            experts,
            self.materialise,
            relative,
            self.differential,
            self.settings.gradient_batch_size,
            self.stages.recipe.decouple.train_batch_size,  # the memory that a backward pass had while training
        )
        return Journal(self.path, NAMES["relative_loss" if relative else "loss"], objective, self.budget)

    def _ends(self) -> tuple[nn.Module, list[Callable[[], nn.Module]]]:
        """The models at w = 0 and at each one-hot: the base and the experts, unless some parameters say otherwise."""
        if not (self.how.rules or self.how.keep):
            parts = experts_of(self.node)
            return self.stages.denoiser.module, [lambda part=part: self.stages.component(part) for part in parts]  # type: ignore[misc]
        ends = [[float(i == j) for j in range(self.experts)] for i in range(self.experts)]
        return self._copied([0.0] * self.experts), [lambda end=end: self._copied(end) for end in ends]  # type: ignore[misc]

    def _copied(self, weights: Given) -> nn.Module:
        return copy.deepcopy(self.materialise(weights))

    @property
    def space(self) -> Space:
        """Where the search looks."""
        if self.settings.search == "gradient":
            return self.differential.space(self.settings)
        row = self.how.method
        default = None if row.name == "task_arithmetic" else tuple(row.default_weights(self.experts))
        return Space(self.experts, self.settings.bounds, default=default)

    def candidates(self) -> list[Candidate]:
        """What FD is to judge."""
        settings = self.settings
        return candidates(
            self.experts,
            settings,
            lambda: self.loss,
            lambda: self.metric if settings.objective == "fd" else self.loss,
            space=self.space,
            seed=self.seed,
        )


class Searching(Measuring):
    """The stage `search`, and what it shares with `merge`."""

    def _merger(self, node: Node) -> Merger:
        """What a merge, or a search for its weights, is made of, opened and checked."""
        how: HowToMerge = node.arguments["how"]
        experts = experts_of(node)
        informed = [node.parents[f"fisher {i}"] for i in range(len(experts)) if how.method.fisher]
        return Merger(
            self.component_folder(self.graph.base),
            [self.component_folder(part) for part in experts],
            how.method.name,
            how.options,
            [self.folder(part) / fisher.FILE for part in informed],
        )

    def _search(self, node: Node, folder: Path) -> Mapping[str, Any]:
        settings, trials = self.recipe.merge, []
        with self._merger(node) as merger:
            asked = Asked(self, node, merger, folder / TRIALS)
            for trial in score(asked.candidates(), asked.metric):
                trials.append(trial)
                log.info("%s: %s %s -> %.4f", node.label, trial.source, _short(trial.weights), trial.value)
        chosen = best(trials)
        objective = (
            f"FD({self.graph.extractor_name}) {settings.sampler.label}, {settings.num_images} images, search split"
        )
        result = {**chosen.as_dict(), "objective": objective, "value_before": trials[0].value}
        found = {**result, "method": settings.search, "trials": [trial.as_dict() for trial in trials]}
        if settings.objective != "fd":
            found["proposed_by"] = NAMES[settings.objective]
        write_json(folder / SEARCH, found)
        return result


def experts_of(node: Node) -> list[Node | Input]:
    """The experts that a merge or a search is of."""
    return [node.parents[f"expert {i}"] for i in range(node.arguments["experts"])]


def _short(weights: list[float]) -> str:
    return "(" + ", ".join(f"{w:.3f}" for w in weights) + ")"
