"""What an experiment leaves: its folder in the run folder of its baseline, with every arm's recipe. No torch.

`arms/<arm>/recipe.yaml` is the recipe as the arm was run: no controls, losses on the baseline's number of ranges. So
`deme run` of that folder trains nothing; of what a whole run measures it adds the rows that the experiment leaves out,
the real images, and of a merged model its ensemble and its merge by uniform weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_diffusion.ablate.entries import normalised
from deme_diffusion.ablate.plan import Plan
from deme_diffusion.ablate.reading import read_plan
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.files import link, write_bytes, write_json, write_text
from deme_diffusion.pipeline.run import ABLATIONS, RECORD, RUN, STORE, Run
from deme_diffusion.recipes import RESOLVED, to_yaml

if TYPE_CHECKING:
    from deme_diffusion.ablate.experiment import Experiment, Trial

__all__ = ["ABLATIONS", "RECORD"]
ARMS, PLAN = "arms", "plan"
LONGEST = 60
"""Characters of a folder's name; of texts that agree so far, a digest tells the rest."""


def slug(text: str) -> str:
    """A file name for any text."""
    words = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    if 0 < len(words) <= LONGEST:
        return words
    return f"{words[:LONGEST].rstrip('-.') or 'unnamed'}-{sha256(text.encode()).hexdigest()[:8]}"


def unused(text: str, taken: set[str]) -> str:
    """A file name that none has yet."""
    taken |= {STORE}  # in both folders that have such names: the link to the store, and what no search enters
    name = next(name for i in range(len(taken) + 1) if (name := f"{slug(text)}{f'-{i + 1}' if i else ''}") not in taken)
    taken.add(name)
    return name


def name_for(plan: Plan, name: str, run: Path) -> str:
    """The name of a plan's experiment in a run folder: where another plan's is there by it, a digest is added."""
    stored = [file for file in (run / ABLATIONS / name).glob(f"{PLAN}.*") if not file.name.endswith(".path")]
    return name if all(_is_of(file, plan) for file in stored) else f"{name}-{_digest(plan)[:8]}"


def _is_of(file: Path, plan: Plan) -> bool:
    try:
        return _digest(read_plan(file)) == _digest(plan)
    except (UserError, OSError):
        return False


def _digest(plan: Plan) -> str:
    """Of what a plan ablates, not of how it is written."""
    said = [{**asdict(one), "line": 0} for one in normalised(plan).ablations]
    return sha256(json.dumps(said, default=str).encode()).hexdigest()


def begin(experiment: Experiment) -> None:
    """The plan as it was read, the baseline's recipe, and all stages by name, before any of them is made."""
    folder, source = experiment.folder, experiment.source
    if source is None:
        from deme_diffusion.ablate.writing import to_yaml as plan_to_yaml

        write_text(folder / f"{PLAN}.yaml", plan_to_yaml(experiment.plan))
    else:
        write_bytes(folder / f"{PLAN}{source.suffix or '.txt'}", source.read_bytes())
    write_text(folder / RESOLVED, to_yaml(experiment.baseline.recipe))
    note(experiment)
    for trial in experiment.ready:
        assert trial.case is not None
        write_text(folder_of(experiment, trial) / RESOLVED, to_yaml(trial.case.recipe))
    # So that a run in an arm's folder finds all that is done.
    link(experiment.run.store.root, folder / ARMS / STORE)


def note(experiment: Experiment) -> None:
    """`run.json`: every stage of the baseline and all arms, so that a clean-up leaves them."""
    known = experiment.stages
    stages = [
        {"stage": node.stage, "digest": digest, "label": node.label, **known.get(digest, {})}
        for digest, (_, node) in experiment.union.items()
    ]
    run = experiment.run
    write_json(experiment.folder / RUN, {"recipe": run.recipe.name, "command": run.command, "stages": stages})


def link_arms(experiment: Experiment) -> None:
    """The base, the experts and the merged model of every arm that has them, as in a run folder."""
    for trial in experiment.ready:
        case = trial.case
        assert case is not None
        if not case.graph.provisional:
            Run(case.recipe, folder_of(experiment, trial), experiment.run.store, case.graph).link()


def folder_of(experiment: Experiment, trial: Trial) -> Path:
    """An arm's folder."""
    return experiment.folder / ARMS / trial.slug


def named(recipe: Recipe, name: str) -> Recipe:
    """An arm's recipe by a name of its own: running it takes no other's folder, and logs tell them apart."""
    return recipe.model_copy(update={"name": f"{recipe.name}-{name}"})


def write_record(experiment: Experiment, content: Mapping[str, Any]) -> None:
    """`ablation.json`."""
    write_json(experiment.folder / RECORD, content)
