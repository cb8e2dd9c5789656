"""The search for merge weights as a stage: its objectives on the search split, its journal, its answer by FD."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from deme_diffusion.errors import UserError
from deme_diffusion.evaluation import fisher
from deme_diffusion.evaluation.objectives import FixedNoiseObjective, FrechetObjective, KernelObjective, Turn
from deme_diffusion.files import write_json
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.differential import Differential
from deme_diffusion.merging.lora import merged_lora
from deme_diffusion.merging.search import (
    Budget,
    Candidate,
    Given,
    Journal,
    Space,
    Trial,
    best,
    best_so_far,
    candidates,
    reserved,
    score,
)
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.models.adapters import in_turn
from deme_diffusion.models.lora import exchange
from deme_diffusion.models.precision import in_float32
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.measure import Measuring
from deme_diffusion.pipeline.merges import HowToMerge
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.workbench import ranges_of_node, seed_of_node
from deme_diffusion.rng import seed_of

log = logging.getLogger(__name__)
FAR = 3.0
"""Weights beyond it are told: what is known of a model that far outside its experts is one search's score."""
SEARCH, TRIALS = "search.json", "search.jsonl"
NAMES = {"fd": "FD", "kid": "KID", "loss": "fixed-noise loss", "relative_loss": "fixed-noise loss over the base's"}
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
        self.plain = Space.of(self.how.method, self.experts, self.settings.bounds, fixed=self.how.fixed)
        self.budget = Budget(self.settings.max_evaluations - reserved(self.plain, self.settings))
        self.seed = seed_of(seed_of_node(self.node), "search")

    @cached_property
    def shell(self) -> nn.Module:
        """The module that every candidate is loaded into."""
        return self.stages.component(self.stages.graph.base)

    def compose(self, weights: Given) -> MergeWeights:
        """With what the recipe says of some parameters."""
        given, how = MergeWeights.of(weights), self.how
        if given.keep:  # the base itself, which no candidate is where the recipe fixes some parameters
            return given
        composed: MergeWeights = how.weights(given.values, given.rules)
        return composed

    def materialise(self, weights: Given) -> nn.Module:
        """The merged model."""
        return self.merger.into(self.shell, self.compose(weights))

    def written(self, weights: Given) -> nn.Module:
        """The model that the merge would write: `materialise`, or of LoRAs what is left at the merged one's rank."""
        if self.stages.recipe.decouple.lora_rank is None or not self.how.cut:
            return self.materialise(weights)
        merged = merged_lora(self.merger, self.compose(weights), self.how.lora_rank)
        return exchange(self._adapted, merged.layers)

    @cached_property
    def _adapted(self) -> nn.Module:
        """Of its own, since `shell` is merged into by the losses."""
        return self.stages.component(self.stages.graph.base)

    @cached_property
    def exact_shell(self) -> nn.Module:
        """The same in float32, for losses: candidates differ by less than half precision's rounding."""
        return in_float32(self.shell)

    @cached_property
    def differential(self) -> Differential:
        """How the merged model depends on the weights."""
        return Differential(self.merger, self.exact_shell, self.compose)

    @cached_property
    def metric(self) -> Journal:
        """FD, or KID, which judges whatever was searched by."""
        stages, settings = self.stages, self.settings
        objective = (KernelObjective if settings.judge == "kid" else FrechetObjective)(
            stages.denoiser,
            self.written,
            stages.splits["search"],
            stages.extractor,
            settings.sampler,
            self.seed,
            settings.num_images,
            stages.recipe.runtime.sample_batch_size,
            stages.searched_by(settings.num_images),
        )
        return Journal(self.path, NAMES[settings.judge], objective, self.budget)

    @cached_property
    def loss(self) -> Journal:
        """The fixed-noise loss with its derivatives: relative where the recipe's objective is."""
        relative = self.settings.objective == "relative_loss"
        base, experts = self._ends()
        objective = FixedNoiseObjective(
            self.stages.fixed_noise("search", ranges_of_node(self.node)),
            base,
            experts,
            lambda weights: self.merger.into(self.exact_shell, self.compose(weights)),
            relative,
            self.differential if self.settings.search == "gradient" else None,
            self.settings.gradient_batch_size,
            self.stages.recipe.decouple.train_batch_size,  # the memory that a backward pass had while training
            self.stages.denoiser.module,
            self._in_turn,
        )
        return Journal(self.path, NAMES["relative_loss" if relative else "loss"], objective, self.budget)

    def _ends(self) -> tuple[nn.Module, list[Callable[[], nn.Module]]]:
        """The models at w = 0 and at each one-hot: the base and the experts, unless some parameters say otherwise."""
        if not self.how.fixed:
            parts = experts_of(self.node)
            return self.stages.denoiser.module, [lambda part=part: self.stages.component(part) for part in parts]  # type: ignore[misc]
        ends = self._one_hots
        return self._copied([0.0] * self.experts), [lambda end=end: self._copied(end) for end in ends]  # type: ignore[misc]

    @property
    def _in_turn(self) -> Callable[[], AbstractContextManager[Sequence[Turn]]] | None:
        """How LoRA experts answer in one base: as adapters in it, or merged where some parameters say otherwise."""
        loras = [lora for part in experts_of(self.node) if (lora := self.stages.lora(part)) is not None]
        if not loras:
            return None
        if not self.how.fixed:
            return partial(in_turn, self.stages.denoiser.module, loras)
        ends = [[0.0] * self.experts, *self._one_hots]
        return lambda: nullcontext([partial(self.materialise, end) for end in ends])

    @property
    def _one_hots(self) -> list[list[float]]:
        return [[float(i == j) for j in range(self.experts)] for i in range(self.experts)]

    def _copied(self, weights: Given) -> nn.Module:
        return copy.deepcopy(self.materialise(weights))

    @property
    def space(self) -> Space:
        """Where the search looks."""
        if self.settings.search == "gradient":
            return replace(self.differential.space(self.settings), fixed=self.how.fixed)
        return self.plain

    def base(self) -> float:
        """FD of the base itself. Raises UserError where there is none."""
        whole = MergeWeights((0.0,) * self.experts, keep={"*": "base"} if self.how.fixed else {})
        try:
            return self.metric.value(whole)
        except UserError as error:
            self.metric.forget()  # what was wrong may be put right
            raise UserError(f"{self.node.label}: the base itself cannot be scored: {error}") from None

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
        with self._merger(node) as merger:
            asked = Asked(self, node, merger, folder / TRIALS)
            merger.check(asked.compose([0.0] * asked.experts))
            try:
                trials, before = _scored(asked), asked.base()
            except KeyboardInterrupt:
                if line := so_far(asked):
                    log.warning("%s: %s", node.label, line)
                raise
        settings, chosen = self.recipe.merge, best(trials)
        said = (node.label, len(trials), chosen.source, _short(chosen.weights), chosen.value)
        log.info("%s: best of %d trials: %s %s -> %.4f", *said)
        if (largest := max(map(abs, chosen.weights))) > FAR:
            log.warning(
                "%s: a weight of %.3g goes far beyond its expert: the task vectors are small or nearly dependent (few "
                "steps?); merge.bounds holds weights back",
                node.label,
                largest,
            )
        if before < chosen.value:
            log.warning("%s: the base itself has %.4f; what the recipe fixes makes it worse", node.label, before)
        judge = f"{NAMES[settings.judge]}({self.graph.extractor_name}) {settings.sampler.label}"
        objective = f"{judge}, {settings.num_images} images, search split"
        result = {**chosen.as_dict(), "objective": objective, "value_before": before}
        found = {**result, "method": settings.search, "trials": [trial.as_dict() for trial in trials]}
        if settings.objective != "fd":
            found["proposed_by"] = NAMES[settings.objective]
        write_json(folder / SEARCH, found)
        return result


def _scored(asked: Asked) -> list[Trial]:
    """All trials, each told with the best so far; the base's own value is asked for first. UserError where none is."""
    trials: list[Trial] = []
    proposals, label = asked.candidates(), asked.node.label
    before = asked.base()
    if asked.how.fixed:
        log.info("%s: the base -> %.4f", label, before)
    for trial in score(proposals, asked.metric):
        trials.append(trial)
        least = best(trials)
        if math.isfinite(trial.value):
            told = (trial.source, _short(trial.weights), trial.value, least.value, least.source)
            log.info("%s: %s %s -> %.4f (best so far %.4f, %s)", label, *told)
        else:
            log.warning("%s: %s %s cannot be used: %s", label, trial.source, _short(trial.weights), trial.reason)
    if not math.isfinite(best(trials).value):
        asked.metric.forget()
        raise UserError(f"{label}: no weights can be scored: {trials[0].reason}")
    return trials


def so_far(asked: Asked) -> str:
    """How to use the best that a search has found, as settings of the recipe; '' before there is any."""
    found = best_so_far(asked.path)
    name = next((name for name in NAMES.values() if name in found), None)
    if name is None:
        return ""
    weights = MergeWeights.from_dict(found[name]["weights"])
    line = f"merge.search=none 'merge.weights={list(weights.values)}'"
    if weights.rules:
        rules = {pattern: list(row) for pattern, row in asked.compose(weights).rules.items()}
        line += f" 'merge.weights_for={json.dumps(rules)}'"
    return f"stopped; the best so far by {name} ({found[name]['value']:.6g}) is {line}"


def experts_of(node: Node) -> list[Node | Input]:
    """The experts that a merge or a search is of."""
    return [node.parents[f"expert {i}"] for i in range(node.arguments["experts"])]


def _short(weights: list[float]) -> str:
    return "(" + ", ".join(f"{w:.3f}" for w in weights) + ")"
