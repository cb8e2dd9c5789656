"""`deme ablate` from Python: a plan carried out on a recipe, and what it found. No torch before it runs."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_diffusion.ablate import outcome
from deme_diffusion.ablate.experiment import Experiment, told
from deme_diffusion.ablate.folder import RECORD, unused, write_record
from deme_diffusion.ablate.opening import check, open_experiment
from deme_diffusion.ablate.plan import Plan
from deme_diffusion.ablate.reading import read_plan
from deme_diffusion.errors import Interrupted, MachineError, UserError, nearest
from deme_diffusion.recipes import load
from deme_diffusion.report.ablation import write_ablation
from deme_diffusion.report.ablation_effects import plain_text
from deme_diffusion.weight_files import read_json

log = logging.getLogger(__name__)
PACKAGED = Path(__file__).parent / "plans"
MOST_NAME = 100
"""Characters of a plan's name that a message repeats: a whole plan may be given where its name belongs."""


@dataclass(frozen=True)
class Findings:
    """What an experiment leaves: its folder, what `ablation.json` there holds, a sentence an ablation."""

    folder: Path
    content: dict[str, Any]
    sentences: tuple[str, ...]

    @property
    def failed(self) -> list[str]:
        """`ablation: arm: error` of every arm that failed."""
        arms = ((ablation["name"], arm) for ablation in self.content["ablations"] for arm in ablation["arms"])
        return [f"{name}: {arm['label']}: {arm['error']}" for name, arm in arms if arm["status"] == "failed"]


def run_plan(
    plan: str | Path | Plan,
    recipe: str | Path,
    *overrides: str,
    seeds: int | None = None,
    out: str | Path | None = None,
    strict: bool = False,
    max_arms: int | None = None,
) -> Findings:
    """Carry out a plan (a path, a packaged name, or one that was read) on a recipe; run again to resume.

    `seeds` K trains each arm and the baseline with seeds 0 to K - 1; `out` is the run folder of the baseline. An arm
    that fails stops no other. Raises UserError, MachineError (also what the baseline raises), Interrupted.
    """
    folder = None if out is None else Path(out)
    opened = opened_plan(plan, str(recipe), overrides, seeds=seeds, out=folder)
    check(opened, strict=strict, max_arms=max_arms)
    return carried_out(opened)


def opened_plan(
    plan: str | Path | Plan,
    recipe: str,
    overrides: Sequence[str],
    *,
    seeds: int | None = None,
    out: Path | None = None,
    command: str = "",
    download: bool = True,
) -> Experiment:
    """The experiment of a plan's document with a recipe and KEY=VALUE overrides, nothing of it made yet."""
    source = None if isinstance(plan, Plan) else found_plan(plan)
    document = plan if isinstance(plan, Plan) else read_plan(source or plan)
    name = unused(source.stem, set()) if source else "plan"
    changes = [*overrides, *([f"seeds={list(range(seeds))}"] if seeds else [])]
    loaded = load(recipe, changes)
    return open_experiment(document, name, loaded, out=out, source=source, command=command, download=download)


def found_plan(plan: str | Path) -> Path:
    """The file of a plan: a path, or a packaged name. Raises UserError where there is none."""
    packaged = {file.stem: file for file in sorted(PACKAGED.glob("*.yaml"))}
    if is_file(plan):
        return Path(plan)
    if str(plan) in packaged:
        return packaged[str(plan)]
    what = "a folder, where a plan is a file" if os.path.isdir(plan) else "no such plan"  # noqa: PTH112 (as below)
    said = f"{plain_text(plan, MOST_NAME)}: {what}{nearest(str(plan)[:MOST_NAME], packaged)}"
    raise UserError(f"{said}; packaged: {', '.join(packaged)}")


def is_file(name: str | Path) -> bool:
    """Whether a name is a file's; one that no file can have is not."""
    return os.path.isfile(name)  # noqa: PTH113 (Path.is_file raises on names that are too long)


def carried_out(experiment: Experiment) -> Findings:
    """Make what is not done; write `ablation.json`, tables, figures and pages from what all arms left."""
    try:
        experiment.execute()
    except (Exception, KeyboardInterrupt) as error:
        if experiment.begun:
            _leave(experiment, error)
        raise
    found = outcome.content(experiment)
    write_record(experiment, found)
    sentences = write_ablation(experiment.folder, found)
    _renew_page(experiment)
    return Findings(experiment.folder, found, tuple(sentences))


def _leave(experiment: Experiment, error: BaseException) -> None:
    """What is there when an experiment ends early: the record, unless an earlier one tells of more, and a line."""
    baseline = experiment.baseline
    if (
        isinstance(error, Exception)
        and not isinstance(error, Interrupted)
        and outcome.status(experiment, baseline) != "done"
    ):
        baseline.error = told(error)
    found = outcome.content(experiment)
    count = _statuses(found)
    arms = ", ".join(f"{count[status]} {status}" for status in ("done", "failed", "missing") if count[status])
    log.warning(
        "%s: %d of %d stages are done; baseline: %s; arms: %s",
        experiment.folder, len(experiment.stages), len(experiment.union), found["baseline"]["status"], arms,
    )  # fmt: skip
    with suppress(MachineError):  # a full disk must not hide why it ended
        if count["done"] >= _done_before(experiment.folder):
            write_record(experiment, found)


def _done_before(folder: Path) -> int:
    try:
        return _statuses(read_json(folder / RECORD))["done"]
    except (UserError, LookupError, TypeError, AttributeError):
        return 0


def _statuses(content: Mapping[str, Any]) -> Counter[str]:
    return Counter(arm["status"] for ablation in content["ablations"] for arm in ablation["arms"])


def _renew_page(experiment: Experiment) -> None:
    """The page of a run that was finished before tells of its ablations as well."""
    if (experiment.run.folder / "table.json").is_file():
        experiment.run.renew()
