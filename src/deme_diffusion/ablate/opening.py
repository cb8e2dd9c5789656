"""How a plan and a recipe become an experiment: each different change one case, what cannot be run told. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deme_diffusion import processes
from deme_diffusion.ablate import folder as folders
from deme_diffusion.ablate.arms import Arm, Resolved
from deme_diffusion.ablate.experiment import Case, Experiment, Part, Trial, told
from deme_diffusion.ablate.plan import Plan
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.recipes import Loaded, changed

MOST_ARMS = 500
"""Arms that run without being allowed by number."""


def open_experiment(
    plan: Plan,
    name: str,
    loaded: Loaded,
    *,
    out: Path | None = None,
    source: Path | None = None,
    command: str = "",
    download: bool = True,
) -> Experiment:
    """The experiment of a plan with a recipe, in the run folder of that recipe.

    Raises UserError for a plan without ablations, and for what opening a run raises.
    """
    if not plan.ablations:
        why = f"; {plan.problems[0]}" if plan.problems else ""
        raise UserError(f"{source or name}: no ablation in it{why}")
    if processes.count() > 1:
        raise UserError("deme ablate: not in a launch of several processes; start it plainly, with --jobs K")
    run = open_run(loaded, out=out, command=command, download=download)
    opened = _Opening(run, compared(run.recipe), download)
    parts = [opened.part(resolve(ablation, opened.recipe)) for ablation in plan.ablations]
    return Experiment(plan, name, run, opened.baseline, parts, source)


def compared(recipe: Recipe) -> Recipe:
    """The recipe as an experiment measures it: without controls, and with losses on the same points in every arm."""
    ranges = recipe.evaluate.loss_ranges or recipe.decouple.num_ranges
    return changed(recipe, {"evaluate.controls": [], "evaluate.loss_ranges": ranges})


class _Opening:
    """What arms become: each different change is one case."""

    def __init__(self, run: Run, recipe: Recipe, download: bool) -> None:
        self.run, self.recipe, self.download = run, recipe, download
        self.baseline = Case(recipe, Graph(recipe, store=run.store))  # fetched when the run was opened
        self.values = recipe.model_dump(mode="json")
        self.cases: dict[str, Case | str] = {}
        self.slugs: set[str] = set()

    def part(self, resolved: Resolved) -> Part:
        """An ablation's arms, those that are ready with what they run."""
        return Part(resolved, tuple(self._trial(resolved, arm) for arm in resolved.arms))

    def _trial(self, resolved: Resolved, arm: Arm) -> Trial:
        slug = folders.unused(f"{resolved.ablation.name}.{arm.label}", self.slugs)
        if arm.status != "ready":
            return Trial(arm, slug)
        arm = replace(arm, change=_different(arm.change, self.values))
        case = self._case(arm, slug)
        if isinstance(case, str):
            return Trial(replace(arm, status="not_executable", reason=case), slug)
        if case.digests == self.baseline.digests:
            reason = "every stage is the baseline's: what it changes plays no part there"
            return Trial(replace(arm, status="same_as_baseline", reason=reason), slug)
        return Trial(arm, slug, case)

    def _case(self, arm: Arm, slug: str) -> Case | str:
        """What the arm runs, or why its recipe cannot be run."""
        key = json.dumps(dict(arm.change), sort_keys=True, default=str)
        if key not in self.cases:
            try:
                recipe = folders.named(changed(self.recipe, arm.change), slug)
                self.cases[key] = Case(recipe, Graph(recipe, download=self._fetches(recipe), store=self.run.store))
            except UserError as error:
                self.cases[key] = told(error)
        return self.cases[key]

    def _fetches(self, recipe: Recipe) -> bool:
        """Only for inputs of its own: the baseline's are here, and an arm must not ask the hub for them again."""
        inputs = ("model", "data", "extractor")
        return self.download and any(getattr(recipe, name) != getattr(self.recipe, name) for name in inputs)


def _different(change: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What a change sets otherwise than the recipe has it: a plan for any recipe says more than one of them needs."""

    def now(path: str) -> Any:
        inner: Any = values
        for part in path.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        return inner

    return {path: value for path, value in change.items() if value != now(path)}


def check(experiment: Experiment, *, strict: bool = False, max_arms: int | None = None, dry: bool = False) -> None:
    """Raises UserError where nothing can be run, where too much would, and with `strict` where anything is left out."""
    where = experiment.source or experiment.name
    if strict and (left := _left_out(experiment)):
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise UserError(f"{where}: {left[0]}{more}")
    if dry:
        return
    if not experiment.ready:
        left = _left_out(experiment)
        raise UserError(f"{where}: none of its {len(experiment.trials)} arms can be run: {left[0]}")
    if len(experiment.ready) > (max_arms or MOST_ARMS):
        count, most = len(experiment.ready), max_arms or MOST_ARMS
        raise UserError(f"{where}: {count:,} arms to run, more than {most:,}; --max-arms {count} allows it")


def _left_out(experiment: Experiment) -> Sequence[str]:
    problems = [str(problem) for problem in experiment.plan.problems]
    arms = [
        f"{part.resolved.ablation.name}: {trial.arm.label}: {trial.arm.status.replace('_', ' ')}: {trial.arm.reason}"
        for part in experiment.parts
        for trial in part.trials
        if trial.case is None
    ]
    empty = [f"{part.resolved.ablation.name}: nothing to run" for part in experiment.parts if not part.trials]
    return [*problems, *arms, *empty]
