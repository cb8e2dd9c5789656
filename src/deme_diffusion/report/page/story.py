"""What was done, in two or three plain sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deme_diffusion.division import names_of
from deme_diffusion.report.cells import REAL_IMAGES
from deme_diffusion.report.page.stages import FINISHED, state_of
from deme_diffusion.report.words import MOST_NAMED, grouped, seeds_said, weights_said

TRIED = re.compile(r"w = 0|uniform|one-hot \d+|the method's own")
"""Weights that every search tries (`merging.search.costs.tried`)."""
Run = Mapping[str, Any]


def story(run: Run) -> list[str]:
    """Sentences on training, merging, the weights and measuring; none of what the run does not tell."""
    parts = (_trained(run), _merged(run), " ".join(weights_said(run)), _measured(run))
    return [" ".join(part.split()) for part in parts if part]


def _trained(run: Run) -> str:
    division = run.get("division")
    if not division or not run.get("stages"):
        return ""
    count, total = len(division["subsets"]), division["num_train_timesteps"]
    base = f"the base {run['base_model']}" if run.get("base_model") else "the base"
    steps = list(_steps(run, "expert "))
    sigmas = f", in sigma {_listed(division['sigmas'])}" if division.get("sigmas") else ""
    ranges = _listed(names_of(division["subsets"]))
    done = all(state_of(stage) in FINISHED for stage in run["stages"] if stage["stage"] == "decouple")
    verb = ("were" if count > 1 else "was") if done else ("are being" if count > 1 else "is being")
    who = f"{count} expert{'s' if count > 1 else ''} {verb}"
    where = f"the timesteps {ranges} of T = {total:,}{sigmas}"
    return f"From {base}, {who} finetuned on {where}{_budget(steps)}{_control(run)}."


def _steps(run: Run, label: str) -> Iterator[int]:
    """Optimizer steps of the trainings whose label begins so, of the first seed."""
    for stage in run["stages"]:
        named = str(stage.get("label") or "")
        if stage["stage"] == "decouple" and named.startswith(label) and stage.get("steps"):
            yield stage["steps"]


def _budget(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    each = f"{steps[0]:,} optimizer steps each" if len(set(steps)) == 1 else f"{min(steps):,} to {max(steps):,} steps"
    return f", {each}"


def _control(run: Run) -> str:
    steps = next(_steps(run, "all-timesteps"), None)
    return f"; the control all-timesteps had {steps:,} steps on all of them" if steps else ""


def _merged(run: Run) -> str:
    weights = (run.get("weights") or {}).get("merged")
    if not weights:
        return ""
    method = (run.get("merge") or {}).get("method", "task_arithmetic").replace("_", " ")
    few = len(weights) <= MOST_NAMED and not run.get("weights_found")  # which tells them
    told = f" {', '.join(f'{w:.3g}' for w in weights)}" if few else ""
    beside = (
        "with small projections beside it" if run.get("projection") else "of the base's architecture, size and cost"
    )
    seed = f" ({said})" if (said := seeds_said(run)) else ""
    found = _found(run, "," if told else " that were")
    text = f"Their task vectors were merged by {method} into one model {beside}, with the weights{told}{found}"
    return f"{text}{seed}."


def _found(run: Run, how: str) -> str:
    search = run.get("search")
    if not search or not search.get("trials"):
        return " given beforehand"
    count = len(search["trials"])
    method = search["method"].replace("_", " ")
    source = str(search.get("source") or "")
    whose = f": {source}, tried by every search" if TRIED.fullmatch(source) else f": {source}" if source else ""
    return f"{how} the best of {count:,} trials by {grouped(search['objective'])} (search: {method}){whose}"


def _measured(run: Run) -> str:
    rows = run.get("table") or []
    models = [row["model"] for row in rows if row["model"] != REAL_IMAGES]
    splits = {f["protocol"].get("split") for row in rows for f in row["metrics"].values()} - {None}
    if not models or not run.get("stages") or splits != {"report"}:
        return ""
    return (
        f"Losses and scores of {_listed(models)} were taken on the report split, which no finetuning and no search of"
        " this run saw."
    )


def _listed(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMED:
        return f"{names[0]}, {names[1]} ... {names[-1]}"
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
