"""What was ablated before: the arms of every `ablation.json` below a runs folder, and what each of them changed.

An arm counts as done for a recipe when it ended well on the same baseline (every setting equal but for
names, seeds, controls and `runtime`, by the `recipe.yaml` beside it) with the recipe's seeds among its own.
Whatever else was measured is evidence of how much a part matters, with half the weight where the baseline was another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deme_diffusion.config import Recipe
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.files import canonical_digest
from deme_diffusion.pipeline.run import RECORD, STORE
from deme_diffusion.recipes import RESOLVED, changed, load
from deme_diffusion.report.ablation_effects import Effect, compare
from deme_diffusion.weight_files import read_json

log = logging.getLogger(__name__)
IDLE: dict[str, Any] = {
    **dict.fromkeys(("name", "description", "demonstration", "seeds", "runtime"), True),
    "evaluate": {"controls", "loss_ranges"},
}
"""What a recipe may differ in and still be the same baseline; an experiment measures no controls."""


@dataclass(frozen=True)
class Measured:
    """One arm that was carried out, or failed. `same`: on the recipe's own baseline; `target`: the changed recipe."""

    recipe: str
    same: bool
    part: str | None
    label: str
    change: Mapping[str, Any]
    status: str
    seeds: tuple[int, ...]
    target: str = ""
    error: str = ""
    effect: Effect | None = None
    baseline: float | None = field(default=None)

    @property
    def relative(self) -> float | None:
        """The size of the effect as a share of the baseline's value; None where nothing was compared."""
        difference = self.effect.difference if self.effect else None
        return abs(difference / self.baseline) if difference is not None and self.baseline else None

    @property
    def relative_margin(self) -> float | None:
        """Half the interval as a share of the baseline's value; None where one seed gives none."""
        margin = self.effect.margin if self.effect else None
        return margin / abs(self.baseline) if margin is not None and self.baseline else None


def what_matters(recipe: Recipe) -> str:
    """Digest of the settings that make two recipes one baseline, or two arms one."""
    return canonical_digest(recipe.model_dump(mode="json", exclude=IDLE))


def read_evidence(runs: Path, recipe: Recipe) -> list[Measured]:
    """Every arm on disk, those of the recipe's own baseline first. A file that cannot be read is said and left out."""
    ours, found = what_matters(recipe), list[Measured]()
    for path in ablation_files(runs):
        try:
            found += _arms(path, recipe, ours)
        except (UserError, MachineError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            log.warning("%s: not read: %s", path, " ".join(str(error).split()) or type(error).__name__)
    return sorted(_latest(found, set(recipe.seeds)), key=lambda one: not one.same)


def ablation_files(runs: Path) -> list[Path]:
    """The `ablation.json` below a folder, but for the store and what is hidden or linked."""
    found = []
    for folder, inner, files in os.walk(runs):
        inner[:] = sorted(name for name in inner if name != STORE and not name.startswith("."))
        found += [Path(folder) / RECORD] if RECORD in files else []
    return found


def _arms(path: Path, recipe: Recipe, ours: str) -> Iterator[Measured]:
    content = read_json(path)
    baseline = _baseline_of(path)
    theirs = what_matters(baseline) if baseline else ""
    same = theirs == ours
    metrics = content["baseline"]["metrics"]
    for ablation in content["ablations"]:
        for arm in ablation["arms"]:
            if arm["status"] in ("done", "failed"):
                seeds = tuple(map(int, content["seeds"]))
                one = _measured(str(content["recipe"]), same, ablation, arm, metrics, recipe, seeds)
                yield one if same else replace(one, target=canonical_digest([theirs, one.change]))


def _measured(
    name: str,
    same: bool,
    ablation: Mapping[str, Any],
    arm: Mapping[str, Any],
    baseline: Mapping[str, Any],
    recipe: Recipe,
    seeds: tuple[int, ...],
) -> Measured:
    effect = _effect(arm["metrics"], baseline) if arm["status"] == "done" else None
    value = baseline[effect.metric]["mean"] if effect else None
    change, part = dict(arm["change"]), ablation.get("part")
    target = _target(recipe, change) if same else ""
    return Measured(
        name, same, part, str(arm["label"]), change, arm["status"], seeds, target, str(arm.get("error") or ""), effect,
        value,
    )  # fmt: skip


def _effect(arm: Mapping[str, Any], baseline: Mapping[str, Any]) -> Effect | None:
    """The difference in the first FD that can be compared, else in the loss: what the report speaks of first."""
    names = [*(name for name in baseline if name.startswith("FD")), "loss"]
    effects = (compare(name, arm, baseline) for name in names)
    return next((effect for effect in effects if effect.difference is not None), None)


def _baseline_of(path: Path) -> Recipe | None:
    """The recipe of the run folder that holds an ablation; None where none of the folders above has one."""
    for folder in path.parents:
        if (folder / RESOLVED).is_file():
            return load(str(folder), as_it_stands=True).recipe
        if (folder / STORE).is_dir():
            break
    return None


def _target(recipe: Recipe, change: Mapping[str, Any]) -> str:
    """What the recipe is with that change; '' where it takes it no longer."""
    try:
        return what_matters(changed(recipe, change))
    except UserError:
        return ""


def _latest(found: list[Measured], seeds: set[int]) -> list[Measured]:
    """One entry an arm: done before failed, then the one with the recipe's seeds, then with the most."""
    best: dict[tuple[str, bool, str], Measured] = {}
    for one in sorted(found, key=lambda m: (m.status == "done", seeds <= set(m.seeds), len(m.seeds))):
        best[one.recipe, one.same, one.target or one.label] = one
    return list(best.values())
