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
from deme_diffusion.ablate.plan import Ablation, Plan
from deme_diffusion.ablate.reading import EMPTY
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.config import Recipe
from deme_diffusion.errors import MachineError, NotFetched, UserError
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.recipes import Loaded, changed

CHANGEABLE = ("model.", "pretrain.", "similarity.", "decouple.", "merge.", "evaluate.samplers")
"""Settings that arms may have of their own; seeds, images, extractor and protocol make them comparable."""
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
        why = next((f"no ablation in it; {problem}" for problem in plan.problems if problem.what != EMPTY), EMPTY)
        raise UserError(f"{source or name}: {why}")
    if processes.count() > 1:
        raise UserError("deme ablate: not in a launch of several processes; start it plainly, with --jobs K")
    run = open_run(loaded, out=out, command=command, download=download)
    opened = _Opening(run, compared(run.recipe), download)
    parts = [opened.part(_resolved(ablation, opened.recipe)) for ablation in plan.ablations]
    return Experiment(plan, folders.name_for(plan, name, run.folder), run, opened.baseline, parts, source)


def compared(recipe: Recipe) -> Recipe:
    """The recipe as an experiment measures it: without controls, and with losses on the same points in every arm."""
    ranges = recipe.evaluate.loss_ranges or recipe.decouple.num_ranges
    return changed(recipe, {"evaluate.controls": [], "evaluate.loss_ranges": ranges})


def _resolved(ablation: Ablation, recipe: Recipe) -> Resolved:
    """What an ablation means; of no part where its exact changes are of several: its own words then say what of."""
    resolved = resolve(ablation, recipe)
    if not ablation.changes:
        return resolved
    alone = (replace(ablation, replacement=[], change=arm.change, changes={}) for arm in resolved.arms if arm.change)
    parts = {resolve(one, recipe).part for one in alone}
    return replace(resolved, part=None) if len(parts) > 1 else resolved


class _Opening:
    """What arms become: each different change is one case."""

    def __init__(self, run: Run, recipe: Recipe, download: bool) -> None:
        self.run, self.recipe, self.download = run, recipe, download
        self.baseline = Case(recipe, Graph(recipe, store=run.store, drawn=()))  # fetched when the run was opened
        self.values = recipe.model_dump(mode="json")
        self.cases: dict[str, Case | str | MachineError] = {}
        self.slugs: set[str] = set()
        self.equal: dict[frozenset[str], Case] = {}
        self.first: dict[Case, str] = {}
        """What runs, with the first arm that asked for it."""

    def part(self, resolved: Resolved) -> Part:
        """An ablation's arms, those that are ready with what they run."""
        return Part(resolved, tuple(self._trial(resolved, arm) for arm in resolved.arms))

    def _trial(self, resolved: Resolved, arm: Arm) -> Trial:
        slug = folders.unused(f"{resolved.ablation.name}.{arm.label}", self.slugs)
        if arm.status != "ready":
            return Trial(arm, slug)
        arm = replace(arm, change=_different(arm.change, self.values))
        case = _fixed(arm.change) or self._case(arm, slug)
        if isinstance(case, str):
            return Trial(replace(arm, status="not_executable", reason=case), slug)
        if isinstance(case, MachineError):
            return Trial(arm, slug, error=told(case))
        if case.digests == self.baseline.digests:
            reason = "every stage is the baseline's: what it changes plays no part there"
            return Trial(replace(arm, status="same_as_baseline", reason=reason), slug)
        return Trial(self._remarked(arm, case, slug), slug, case)

    def _remarked(self, arm: Arm, case: Case, label: str) -> Arm:
        """The arm, with the earlier one that is equal."""
        if (first := self.first.setdefault(case, label)) == label:
            return arm
        return replace(arm, reason="; ".join(filter(None, (arm.reason, f"same as {first!r}, run once"))))

    def _case(self, arm: Arm, slug: str) -> Case | str | MachineError:
        """What the arm runs, or why its recipe cannot be run, or not now."""
        key = json.dumps(dict(arm.change), sort_keys=True, default=str)
        if key not in self.cases:
            try:
                recipe = folders.named(changed(self.recipe, arm.change), slug)
                graph = Graph(recipe, download=self._fetches(recipe), store=self.run.store, drawn=())
                case = Case(recipe, graph)
                # Another change may make the same recipe, or the same of all that is measured.
                self.cases[key] = self.equal.setdefault(frozenset(case.digests), case)
            except NotFetched as error:  # another time it may come
                self.cases[key] = MachineError(str(error))
            except UserError as error:
                self.cases[key] = told(error)
        return self.cases[key]

    def _fetches(self, recipe: Recipe) -> bool:
        """Only for inputs of its own: the baseline's are here, and an arm must not ask the hub for them again."""
        inputs = ("model", "data", "extractor")
        return self.download and any(getattr(recipe, name) != getattr(self.recipe, name) for name in inputs)


def _fixed(change: Mapping[str, Any]) -> str:
    """Why a change is none that an arm may make; '' where it is one."""
    held = [path for path in change if not path.startswith(CHANGEABLE)]
    if not held:
        return ""
    said = "all arms have the baseline's, or nothing could be compared"
    return f"it changes {', '.join(held)}: {said}; change the baseline by KEY=VALUE"


def _different(change: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What a change sets otherwise than the recipe has it: a plan for any recipe says more than one of them needs."""

    def now(path: str) -> Any:
        inner: Any = values
        for part in path.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        return inner

    return {path: value for path, value in change.items() if value != now(path)}


def check(experiment: Experiment, *, strict: bool = False, max_arms: int | None = None, dry: bool = False) -> None:
    """Raises UserError where nothing can be run or too much would; with `strict` where an entry or an arm is left out.

    A metric that cannot be given stops nothing: its table says so.
    """
    where = experiment.source or experiment.name
    if strict and (left := _left_out(experiment)):
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise UserError(f"{where}: {left[0]}{more}")
    if dry:
        return
    lost = next((trial for trial in experiment.trials if trial.error), None)
    if lost and (strict or not experiment.ready):
        raise MachineError(f"{where}: {lost.arm.label}: {lost.error}")
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
        if trial.case is None and not trial.error
    ]
    empty = [f"{part.resolved.ablation.name}: nothing to run" for part in experiment.parts if not part.trials]
    return [*problems, *arms, *empty]
