"""What an experiment found, as plain values: the figures of baseline and arms, steps and seconds. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deme_diffusion.ablate.experiment import Case, Experiment, Part, Trial
from deme_diffusion.ablate.folder import folder_of
from deme_diffusion.pipeline import table
from deme_diffusion.provenance import provenance
from deme_diffusion.report.cells import Figure, Row

Content = dict[str, Any]
EMPTY: Content = {"model": "", "metrics": {}, "division": {}, "steps": 0, "seconds": 0.0}
"""What an arm without figures has in their place."""


def planned(experiment: Experiment) -> Content:
    """What will run: every arm with its change, or why it cannot be run; training steps shared and independent."""
    return {
        "ablations": [
            {**_named(part), **_asked(part), "arms": [_planned(trial) for trial in part.trials]}
            for part in experiment.parts
        ],
        "steps": experiment.steps(),
        "problems": [asdict(problem) for problem in experiment.plan.problems],
    }


def _named(part: Part) -> Content:
    ablation, resolved = part.resolved.ablation, part.resolved
    named = {"name": ablation.name, "ablated_part": ablation.ablated_part, "action": ablation.action}
    return {**named, "part": resolved.part, "metrics": [_plain(asdict(metric)) for metric in resolved.metrics]}


def _asked(part: Part) -> Content:
    """The metrics as the plan names them; `measured` says what each stands for, or why there is none."""
    return {"metrics": list(part.resolved.ablation.metrics), "measured": _named(part)["metrics"]}


def _planned(trial: Trial) -> Content:
    names = ("replacement", "change", "status", "reason", "nearest", "score")
    said = {name: _plain(getattr(trial if name == "reason" else trial.arm, name)) for name in names}
    return {**said, "score": round(trial.arm.score, 3)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def content(experiment: Experiment) -> Content:
    """What `ablation.json` holds."""
    baseline, recipe = experiment.baseline, experiment.baseline.recipe
    done = status(experiment, baseline) == "done"
    return {
        "recipe": recipe.name,
        "plan": experiment.name,
        "discussion": experiment.plan.discussion,
        "command": experiment.run.command,
        "seeds": list(recipe.seeds),
        "outcome": baseline.graph.outcome,
        "baseline": _baseline(experiment),
        "base": {"metrics": _figures(_rows(experiment, baseline), "base") if done else {}},
        "ablations": [_ablation(experiment, part) for part in experiment.parts],
        "problems": [asdict(problem) for problem in experiment.plan.problems],
        "steps": experiment.trained(),
        "seconds": experiment.seconds(),
        "provenance": dict(provenance()),
    }


def _baseline(experiment: Experiment) -> Content:
    """The baseline; before all that it measures is there, without figures."""
    case = experiment.baseline
    said: Content = {"change": {}, "status": status(experiment, case), "error": case.error or None}
    return said | (_measured(experiment, case) if said["status"] == "done" else _unmeasured(experiment, case))


def _ablation(experiment: Experiment, part: Part) -> Content:
    arms = [_arm(experiment, trial) for trial in part.trials]
    return {**_named(part), "score": part.resolved.score, "arms": arms}


def _arm(experiment: Experiment, trial: Trial) -> Content:
    """An arm as it was planned and what became of it."""
    arm, case = trial.arm, trial.case
    said = {**_planned(trial), "label": arm.label, "score": arm.score, "error": None, "folder": None}
    if case is None:
        return {**said, **EMPTY} | ({"status": "failed", "error": trial.error} if trial.error else {})
    folder = str(folder_of(experiment, trial).relative_to(experiment.folder))
    said |= {"folder": folder, "status": status(experiment, case), "error": case.error or None}
    return said | (_measured(experiment, case) if said["status"] == "done" else _unmeasured(experiment, case))


def _unmeasured(experiment: Experiment, case: Case) -> Content:
    return {**EMPTY, "steps": experiment.steps_done(case.needed), "seconds": experiment.spent(case.needed)}


def status(experiment: Experiment, case: Case) -> str:
    """Whether what a case measures is there: done, failed, or missing after an interruption."""
    if case.error:
        return "failed"
    store = experiment.run.store
    return "done" if all(store.status(node.key) == "done" for node in case.targets) else "missing"


def _measured(experiment: Experiment, case: Case) -> Content:
    rows, model = _rows(experiment, case), case.graph.outcome
    return {
        "model": model,
        "metrics": _figures(rows, model),
        "division": case.graph.division.as_dict(),
        "steps": case.steps,
        "seconds": experiment.spent(case.needed),
    }


def _rows(experiment: Experiment, case: Case) -> list[Row]:
    """The case's rows, the columns of its samplers named as the baseline's."""
    graph = case.graph
    rows = table.rows(graph, experiment.run.store, graph.extractor_name, case.rows)
    ours, theirs = ([s.label for s in c.recipe.evaluate.samplers] for c in (case, experiment.baseline))
    labels = _labels(ours, theirs)
    return [{**row, "metrics": {_renamed(k, labels): v for k, v in row["metrics"].items()}} for row in rows]


def _labels(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """The baseline's name for each sampler that it has not: by position among those that are in one of them only."""
    return dict(zip((s for s in ours if s not in theirs), (s for s in theirs if s not in ours), strict=False))


def _renamed(metric: str, labels: Mapping[str, str]) -> str:
    """`FD(digits) DDIM-5` -> `FD(digits) DDIM-20`: its protocol still says what it was."""
    name, space, sampler = metric.rpartition(" ")
    return f"{name} {labels[sampler]}" if space and sampler in labels else metric


def _figures(rows: Sequence[Row], model: str) -> Mapping[str, Figure]:
    return next(row["metrics"] for row in rows if row["model"] == model)
