"""`deme ablate` from Python: a plan carried out on a recipe, and what it found. No torch before it runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_diffusion.ablate import outcome
from deme_diffusion.ablate.experiment import Experiment
from deme_diffusion.ablate.folder import slug, write_record
from deme_diffusion.ablate.opening import check, open_experiment
from deme_diffusion.ablate.plan import Plan
from deme_diffusion.ablate.reading import read_plan
from deme_diffusion.errors import Interrupted, UserError, nearest
from deme_diffusion.recipes import load
from deme_diffusion.report.ablation import write_ablation

log = logging.getLogger(__name__)
PACKAGED = Path(__file__).parent / "plans"


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
    document = plan if isinstance(plan, Plan) else read_plan(found_plan(plan))
    name = slug(source.stem) if source else "plan"
    changes = [*overrides, *([f"seeds={list(range(seeds))}"] if seeds else [])]
    loaded = load(recipe, changes)
    return open_experiment(document, name, loaded, out=out, source=source, command=command, download=download)


def found_plan(plan: str | Path) -> Path:
    """The file of a plan: a path, or a packaged name. Raises UserError where there is none."""
    packaged = {file.stem: file for file in sorted(PACKAGED.glob("*.yaml"))}
    path = Path(plan)
    if str(plan) in packaged and not path.is_file():
        return packaged[str(plan)]
    if path.is_file():
        return path
    what = "a folder, where a plan is a file" if path.is_dir() else "no such plan"
    raise UserError(f"{plan}: {what}{nearest(str(plan), packaged)}; packaged: {', '.join(packaged)}")


def carried_out(experiment: Experiment) -> Findings:
    """Make what is not done; write `ablation.json`, tables, figures and pages from what all arms left."""
    try:
        experiment.execute()
    except (Interrupted, KeyboardInterrupt):
        if outcome.status(experiment, experiment.baseline) == "done":
            write_record(experiment, outcome.content(experiment))
        raise
    found = outcome.content(experiment)
    write_record(experiment, found)
    sentences = write_ablation(experiment.folder, found)
    _renew_page(experiment)
    return Findings(experiment.folder, found, tuple(sentences))


def _renew_page(experiment: Experiment) -> None:
    """The page of a run that was finished before tells of its ablations as well."""
    run = experiment.run
    if (run.folder / "table.json").is_file() and all(run.store.status(n.key) == "done" for n in run.graph.nodes):
        run.stages = run.recorded()
        run.report()
