"""Everything that the parts table lets a recipe ablate and that is not done yet, with the training it would add."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deme_diffusion.ablate.arms import Arm, Resolved
from deme_diffusion.ablate.opening import compared
from deme_diffusion.ablate.parts import PARTS
from deme_diffusion.ablate.plan import Ablation, Action
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.ablate.rows import Part
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.planner.evidence import Measured, what_matters
from deme_diffusion.planner.ranking import Candidate
from deme_diffusion.recipes import changed

log = logging.getLogger(__name__)
METRICS = ("FD", "KID", "loss")
PROMPTED = "CLIP score"
"""What is asked for besides where the recipe scores how images fit their prompts."""
SERVING = ("parameters", "disk space", "peak memory", "load time", "latency")
"""What is asked for besides where an arm serves the ensemble."""


class Baseline:
    """What an experiment measures of a recipe, and what a change adds to it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.seeds = compared(recipe), len(recipe.seeds)
        self._measured, self._trained = _stages(self.recipe)
        self.steps = self.seeds * sum(self._trained.values())
        """Training steps over all seeds."""

    def added(self, change: Mapping[str, Any]) -> int | None:
        """Training steps that an arm adds; None where it plays no part, or cannot be run as only a file can tell."""
        try:
            measured, trained = _stages(changed(self.recipe, change))
        except UserError as error:
            log.debug("%s: %s", dict(change), error)
            return None
        if measured == self._measured:
            return None
        return self.seeds * sum(steps for digest, steps in trained.items() if digest not in self._trained)


def _stages(recipe: Recipe) -> tuple[frozenset[str], dict[str, int]]:
    """What one seed measures, by digest, and the steps of the trainings it needs."""
    graph = Graph(recipe.model_copy(update={"seeds": recipe.seeds[:1]}), drawn=())
    targets = graph.measured(["base", graph.outcome])
    trained = {node.digest: node.steps for node in graph.needed(targets) if node.steps}
    return frozenset(node.digest for node in targets), trained


def missing(recipe: Recipe, evidence: Sequence[Measured]) -> list[Candidate]:
    """The candidates in the table's order; two that make the same recipe are one, under the first name."""
    done, failed = done_targets(recipe, evidence), failed_targets(evidence)
    baseline, seen, found = Baseline(recipe), set[frozenset[str]](), list[Candidate]()
    left = list[str]()
    for part, action, replacement in in_words(recipe):
        arms = ready(resolve(asked(part.name, action, [replacement] if replacement else []), recipe), part.name)
        new = {what_matters(changed(recipe, arm.change)): arm.change for arm in arms or ()}
        targets = frozenset(new)
        if not targets:
            left.append(f"{part.name} {action} {replacement or ''}".rstrip())
        if not targets or targets <= done or targets in seen:
            continue
        seen.add(targets)
        added = [baseline.added(change) for change in new.values()]
        if None in added:
            continue
        steps = sum(more or 0 for target, more in zip(new, added, strict=True) if target not in done)
        why = next((failed[target] for target in targets if target in failed), "")
        measuring = all(path.startswith("evaluate.") for change in new.values() for path in change)
        cost = steps / max(1, baseline.steps)
        found.append(Candidate(part.name, action, replacement, targets, steps, cost, why, measuring))
    if left:
        log.info("%d changes of the table cannot be run on %s", len(left), recipe.name)
        log.debug("cannot be run on %s: %s", recipe.name, "; ".join(left))
    return found


def in_words(recipe: Recipe) -> Iterator[tuple[Part, Action, str | None]]:
    """Every part with every action it declares: REMOVE and ADD as they are, REPLACE by each value the table names."""
    for part in PARTS.values():
        for action in part.actions:
            if action == "REPLACE":
                examples = part.numeric.examples if part.numeric else ()
                yield from ((part, action, name) for name in (*(r.name for r in part.replacements), *examples))
            elif part.is_on(recipe) == (action == "REMOVE"):
                yield part, action, None


def asked(
    part: str, action: Action, replacement: Sequence[str], *, serving: bool = False, prompted: bool = False
) -> Ablation:
    """An ablation in the table's own words."""
    what = {"REMOVE": f"Without {part}", "REPLACE": f"Other {part}", "ADD": f"With {part}"}[action]
    metrics = [*METRICS, *([PROMPTED] if prompted else []), *(SERVING if serving else ())]
    return Ablation(what, part, action, list(replacement), metrics)


def ready(resolved: Resolved, part: str | None = None) -> tuple[Arm, ...] | None:
    """The arms, where all can be run (and the ablation is understood as one of `part`); else None."""
    if not resolved.arms or any(arm.status != "ready" for arm in resolved.arms):
        return None
    return None if part is not None and resolved.part != part else resolved.arms


def done_targets(recipe: Recipe, evidence: Sequence[Measured]) -> frozenset[str]:
    """The changed recipes that were measured on this baseline with its seeds, and perhaps more."""
    wanted = set(recipe.seeds)
    enough = (one for one in evidence if one.same and one.status == "done" and wanted <= set(one.seeds))
    return frozenset(one.target for one in enough if one.target)


def failed_targets(evidence: Sequence[Measured]) -> dict[str, str]:
    """The changed recipes that failed on this baseline, with the error."""
    return {one.target: one.error or "no error noted" for one in evidence if one.same and one.status == "failed"}
