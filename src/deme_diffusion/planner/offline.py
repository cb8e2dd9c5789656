"""The next plan without a language model: what is missing, ranked, with the numbers behind it in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deme_diffusion.ablate.plan import Ablation, Plan
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.config import Recipe
from deme_diffusion.planner.candidates import Baseline, asked, missing, ready
from deme_diffusion.planner.evidence import Measured, read_evidence
from deme_diffusion.planner.ranking import PRIOR, Candidate, Choice, choose

MOST_NAMED = 3
"""Measured arms that the reasoning names for a part; the others are counted."""


def propose(recipe: Recipe, runs: Path, count: int = 5) -> Plan | None:
    """The `count` best missing ablations, every one of which resolves to ready arms; None where nothing is missing."""
    evidence = read_evidence(runs, recipe)
    candidates = missing(recipe, evidence)
    choices = choose(candidates, evidence, count, lambda choice: runnable(choice, recipe))
    if not choices:
        return None
    ablations = [ablation_of(choice, recipe) for choice in choices]
    return Plan(discussion(recipe, evidence, candidates, choices), ablations)


def ablation_of(choice: Choice, recipe: Recipe) -> Ablation:
    """The choice in the words of a plan; where an arm serves the ensemble, what serving costs is asked for as well."""
    names = [one.replacement for one in choice.candidates if one.replacement is not None]
    ablation = asked(choice.part, choice.action, names)
    changes = [arm.change for arm in resolve(ablation, recipe).arms]
    serving = any(change.get("merge.method") == "none" and "decouple.num_ranges" not in change for change in changes)
    wanted = asked(choice.part, choice.action, names, serving=serving, prompted=recipe.evaluate.clip_score)
    known = [metric.asked for metric in resolve(wanted, recipe).metrics if metric.columns]
    return replace(wanted, metrics=known)


def runnable(choice: Choice, recipe: Recipe) -> Choice | None:
    """The choice, reduced to the candidates whose arms are ready in the words of a plan; None where none are."""
    if ready(resolve(ablation_of(choice, recipe), recipe), choice.part):
        return choice
    kept = [one for one in choice.candidates if _resolves(one, choice, recipe)]
    reduced = replace(choice, candidates=tuple(kept))
    whole = bool(kept) and ready(resolve(ablation_of(reduced, recipe), recipe), choice.part)
    return reduced if whole else None


def _resolves(candidate: Candidate, choice: Choice, recipe: Recipe) -> bool:
    alone = replace(choice, candidates=(candidate,))
    return ready(resolve(ablation_of(alone, recipe), recipe), choice.part) is not None


# -- the reasoning -----------------------------------------------------------------------------------


def discussion(
    recipe: Recipe, evidence: Sequence[Measured], candidates: Sequence[Candidate], choices: Sequence[Choice]
) -> str:
    """Why these, in plain words and with the numbers used."""
    seeds = f"{len(recipe.seeds)} seed" + ("s" if len(recipe.seeds) > 1 else "")
    known = [one for one in evidence if one.status == "done"]
    here = [one for one in known if one.same]
    start = (
        f"The baseline is the recipe {recipe.name} with {seeds}, which trains {Baseline(recipe).steps:,} steps. "
        f"{_arms(len(here))} measured on it and {_arms(len(known) - len(here), short=True)} on other baselines; "
        f"{len(candidates)} changes that the parts table allows are not done."
    )
    rule = (
        "Each is scored by the size of its part's effect (a share of the baseline's FD; "
        f"{PRIOR:.0%} where nothing was measured, and measured effects count by how narrow their interval is), times "
        "its novelty (1 for a part of which nothing was measured or planned, less with every arm), divided by 1 + the "
        "share of the baseline's training steps that it adds."
    )
    reasons = [f"{number}. {_reason(choice)}" for number, choice in enumerate(choices, start=1)]
    return "\n\n".join([start, rule, "\n".join(reasons)])


def _arms(count: int, *, short: bool = False) -> str:
    return str(count) if short else f"{count} arm was" if count == 1 else f"{count} arms were"


def _reason(choice: Choice) -> str:
    what = {"REMOVE": "removing it", "ADD": "adding it"}.get(choice.action, "replacing it by " + _replacements(choice))
    cost = f"{choice.steps:,} training steps more" if choice.steps else "no training"
    numbers = f"size {choice.standing.size:.3f}, novelty {choice.novelty:.2f}, score {choice.score:.4f}"
    failed = [f" It failed before: {one.failed.rstrip('.')[:200]}." for one in choice.candidates if one.failed]
    return f"{choice.part}, {what} ({cost}; {numbers}). {_known(choice)}{failed[0] if failed else ''}"


def _replacements(choice: Choice) -> str:
    return ", ".join(one.replacement or "" for one in choice.candidates)


def _known(choice: Choice) -> str:
    """What was measured of the part, the largest effects first."""
    arms = sorted(choice.standing.arms, key=lambda one: -(one.relative or 0.0))
    if not arms:
        return "Nothing of this part was measured yet."
    more = f" and {len(arms) - MOST_NAMED} more" if len(arms) > MOST_NAMED else ""
    return f"Measured: {'; '.join(map(said, arms[:MOST_NAMED]))}{more}."


def said(one: Measured) -> str:
    """`TIES: FD +0.81 ± 0.20 of 6.40 with 3 seeds (another baseline: cifar10)`."""
    where = "" if one.same else f" (another baseline: {one.recipe})"
    seeds = f"with {len(one.seeds)} seed" + ("s" if len(one.seeds) > 1 else "")
    if one.effect is None or one.effect.difference is None or one.baseline is None:
        return f"{one.label}: no metric to compare, {seeds}{where}"
    margin = "" if one.effect.margin is None else f" ± {one.effect.margin:.3g}"
    return (
        f"{one.label}: {one.effect.metric} {one.effect.difference:+.3g}{margin} of {one.baseline:.4g}, {seeds}{where}"
    )
