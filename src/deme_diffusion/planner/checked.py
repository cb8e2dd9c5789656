"""A plan as Markdown that reads as the same plan and that the recipe can run: verified before anything is written."""

from __future__ import annotations

import re
from dataclasses import replace

from deme_diffusion.ablate.entries import normalised
from deme_diffusion.ablate.opening import open_experiment
from deme_diffusion.ablate.plan import Plan
from deme_diffusion.ablate.reading import read_text
from deme_diffusion.ablate.writing import to_markdown
from deme_diffusion.config import Recipe
from deme_diffusion.errors import MachineError
from deme_diffusion.recipes import Loaded


def markdown_of(plan: Plan, recipe: Recipe, title: str) -> str:
    """The plan in form (a). Raises MachineError where what was written would not run: a fault of ours."""
    plan = normalised(plan)
    for discussion in (plan.discussion, _plain(plan.discussion)):
        text = to_markdown(replace(plan, discussion=discussion), title)
        again = read_text(text)
        if again.ablations == plan.ablations and not again.problems:
            break
    else:
        raise MachineError("the plan would not read as it was meant; please report this")
    opened = open_experiment(again, "plan", Loaded(recipe, {}), download=False)  # as deme ablate would
    left = next((trial.arm for trial in opened.trials if trial.case is None), None)
    if left:
        raise MachineError(f"{left.label}: would not run on {recipe.name} ({left.reason}); please report this")
    return text


def _plain(text: str) -> str:
    """Prose that no reader can take for a part of the plan: no marks of headings, lists, tags or fields."""
    return re.sub(r"[#<>`*]+", "", text)
