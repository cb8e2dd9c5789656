"""What is said of an experiment on a terminal: what will run before it does, and what it took. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from deme_diffusion.ablate.experiment import Experiment, Part
from deme_diffusion.ablate.opening import MOST_ARMS
from deme_diffusion.ablate.plan import Plan
from deme_diffusion.pipeline.estimate import seconds_of, time_said
from deme_diffusion.report.ablation_effects import plain_text
from deme_diffusion.report.ablation_samplers import samplers_said

MOST_NEAREST = 5
STYLES = {"ready": "green", "same_as_baseline": "yellow", "not_executable": "red"}


def tables(experiment: Experiment) -> list[Table]:
    """A table an ablation: its arms, what they change, and why one is not to run."""
    return [_table(part) for part in experiment.parts]


def _table(part: Part) -> Table:
    ablation = part.resolved.ablation
    title = f"{ablation.name}: {ablation.action} {part.resolved.part or ablation.ablated_part}"
    table = Table(title=Text(plain_text(title)), title_justify="left")
    for column in ("arm", "status", "score", "change", "reason"):
        table.add_column(column, overflow="fold")
    for trial in part.trials:
        arm = trial.arm
        change = "\n".join(f"{path}={samplers_said(value) or setting(value)}" for path, value in arm.change.items())
        status = Text(arm.status.replace("_", " "), style=STYLES[arm.status])
        cells = (Text(f"{arm.score:.2f}"), Text(change), Text(plain_text(why(trial.reason, arm.nearest))))
        table.add_row(Text(plain_text(arm.label)), status, *cells)
    return table


def why(reason: str, nearest: Sequence[str]) -> str:
    """A reason with the few that come nearest, once: it may list what the part takes itself."""
    few, listed = nearest[:MOST_NEAREST], "; ".join(nearest)
    more = [f"{len(nearest) - len(few)} more (deme ablate --parts)"] if len(nearest) > len(few) else []
    if len(nearest) > 1 and listed in reason:
        return reason.replace(listed, "; ".join([*few, *more]))
    left = [name for name in few if name not in reason]
    return reason + (f" (nearest: {', '.join(left)})" if left else "")


def metric_lines(experiment: Experiment) -> list[str]:
    """What stands for the metrics that the plan asks for, a line each, or why nothing does."""
    metrics = {metric.asked: metric for part in experiment.parts for metric in part.resolved.metrics if metric.asked}
    return [f"{asked}: {', '.join(metric.columns) or metric.reason}" for asked, metric in metrics.items()]


def setting(value: Any) -> str:
    """A setting's value as an override has it."""
    return value if isinstance(value, str) else json.dumps(value)


def equal_lines(plan: Plan) -> list[str]:
    """Which ablations are the same as an earlier one, counted from 1."""
    first: dict[str, int] = {}
    lines = []
    for number, one in enumerate(plan.ablations, 1):
        said = (one.ablated_part, one.action, one.replacement, one.change, one.changes)
        earlier = first.setdefault(repr(said), number)
        if earlier != number:
            lines.append(f"ablation {number} ({plain_text(one.name)}) equals ablation {earlier}")
    return lines


def problem_lines(experiment: Experiment) -> list[str]:
    """The entries that could not be read, a line each."""
    return [f"not read: {problem}" for problem in experiment.plan.problems]


def needs_lines(experiment: Experiment) -> list[str]:
    """How much will run: arms, steps shared and alone, what is left, and a rough time."""
    store, steps, ready = experiment.run.store, experiment.steps(), len(experiment.ready)
    left = [(graph, node) for graph, node in experiment.union.values() if store.status(node.key) != "done"]
    seconds = seconds_of(left)
    seeds = len(experiment.baseline.recipe.seeds)
    lines = [
        f"{ready:,} of {len(experiment.trials):,} arms to run beside the baseline, "
        f"each with {seeds} seed{'s' if seeds > 1 else ''}",
        steps_said(steps),
        f"to do: {sum(node.steps for _, node in left):,} steps",
        f"folder: {experiment.folder}",
    ]
    if seconds is not None and left:
        lines.insert(3, f"time: about {time_said(seconds)} on this machine's cores (a rough estimate)")
    if not ready:
        lines.append("nothing of it can be run: without --dry-run this is refused")
    if ready > MOST_ARMS:
        lines.append(f"more than {MOST_ARMS} arms: running them needs --max-arms {ready}")
    return lines


def made_lines(content: Mapping[str, Any]) -> list[str]:
    """What it took, shared and as independent runs would."""
    seconds = content["seconds"]
    each = f"time: {time_said(seconds['shared'])} in stages, {time_said(seconds['independent'])} as independent runs"
    return [steps_said(content["steps"]), each]


def steps_said(steps: Mapping[str, int]) -> str:
    """Training steps together and as independent runs."""
    shared, alone = steps["shared"], steps["independent"]
    share = f" ({shared / alone:.2f} of them)" if alone else ""
    return f"training: {shared:,} steps; as independent runs {alone:,}{share}"
