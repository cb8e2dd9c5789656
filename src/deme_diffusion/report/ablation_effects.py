"""What each arm of an ablation changes: its figures against the baseline's, seed by seed, and its cost of serving."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deme_diffusion.report.ablation_costs import COSTS, ServingCosts, same_sampler, serving_costs
from deme_diffusion.report.cells import SAMPLING_FIELDS, Figure, compact, decimals_for, direction, figure_decimals
from deme_diffusion.report.paired import holm, margin_of, p_value, paired_differences

Content = Mapping[str, Any]
"""What `ablation.json` holds, a part of it, or an arm's `metrics`."""
Outcome = Literal["better", "worse", "changed", "none", "identical", "alike", "one seed", "n/a"]
CHANGEABLE = SAMPLING_FIELDS | {"eta"}
"""Fields of a protocol in which an arm may differ: it is what they change. Elsewhere a difference forbids comparing."""
NOT_RUN = ("not_executable", "same_as_baseline")
CONTINUOUS = ("FD", "KID", "loss")
"""Scores that two models do not share by chance, as they may one that counts images."""


@dataclass(frozen=True)
class Effect:
    """One metric of an arm minus the baseline's: `difference` ± `margin`, half the 95% interval over paired seeds.

    With one seed, or where all seeds differ alike, there is no margin and no p. `survives`: whether the difference also
    holds when all comparisons of the experiment are tested together (Holm).
    """

    metric: str
    outcome: Outcome
    difference: float | None = None
    margin: float | None = None
    seeds: int = 0
    p: float | None = None
    survives: bool = False
    reason: str = ""


@dataclass(frozen=True)
class ArmEffects:
    """An arm that ran, or its `error`. `serving`: what serving it costs against the baseline."""

    label: str
    status: str
    effects: tuple[Effect, ...] = ()
    serving: ServingCosts = field(default_factory=ServingCosts)
    error: str = ""
    metrics: Mapping[str, Figure] = field(default_factory=dict, repr=False)

    def of(self, metric: str) -> Effect | None:
        """The effect on one metric."""
        return next((effect for effect in self.effects if effect.metric == metric), None)


@dataclass(frozen=True)
class Columns:
    """The table's metrics that an ablation asks for: of quality, of these the `primary` score's, of cost; and the rest.

    `missing` is the metrics that the recipe cannot give, each with its reason; `cost_asked`: the plan asks for costs.
    """

    quality: tuple[str, ...]
    primary: tuple[str, ...]
    costs: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]
    cost_asked: bool = False


def plain_text(text: object, most: int = 0) -> str:
    """Text from a plan in one line, without control characters; longer than `most` it is cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if not most or len(line) <= most else line[: most - 1].rstrip() + "…"


def columns_of(content: Content, ablation: Content) -> Columns:
    """The asked columns that exist, FD (or the loss) where none is of quality; costs where size or sampler differ."""
    names = _names(content, ablation)
    asked = [name for metric in ablation["metrics"] for name in _matching(names, metric["columns"])]
    quality = [name for name in dict.fromkeys(asked) if name not in COSTS]
    quality = quality or _matching(names, ["FD"]) or _matching(names, ["loss"])
    cost_asked = any(name in COSTS for name in asked)
    whole = cost_asked or any(_serves_otherwise(content, arm) for arm in ablation["arms"])
    costs = tuple(c for c in COSTS if c in names) if whole else ()
    return Columns(tuple(quality), _primary(quality), costs, tuple(_missing(names, ablation)), cost_asked)


def _names(content: Content, ablation: Content) -> list[str]:
    tables = [content["baseline"]["metrics"], *(arm.get("metrics") or {} for arm in ablation["arms"])]
    return list(dict.fromkeys(name for table in tables for name in table))


def _matching(names: Iterable[str], prefixes: Sequence[str]) -> list[str]:
    """`FD` is any extractor's FD with any sampler; a name in full is itself."""
    starts = [(prefix, (f"{prefix}(", f"{prefix} ")) for prefix in prefixes]
    return [name for prefix, wanted in starts for name in names if name == prefix or name.startswith(wanted)]


def _missing(names: Sequence[str], ablation: Content) -> Iterable[tuple[str, str]]:
    for metric in ablation["metrics"]:
        if not _matching(names, metric["columns"]):
            yield plain_text(metric["asked"]), plain_text(metric["reason"] or "this recipe does not measure it")


def score_of(metric: str) -> str:
    """A metric's name without the sampler or the range: `FD(digits-cnn) DDIM-50` is the score `FD(digits-cnn)`."""
    if metric.startswith("loss "):  # a range's name may have spaces
        return "loss"
    return metric.rpartition(" ")[0] or metric


def _primary(quality: Sequence[str]) -> tuple[str, ...]:
    """The columns that the verdict speaks of first: FD, else the loss overall, else the first score asked for."""
    if not quality:
        return ()
    scores = [score_of(name) for name in quality]
    first = (score for score in scores if re.split(r"[ (]", score)[0] == "FD")
    score = next(first, "loss" if "loss" in scores else scores[0])
    return (score,) if score in quality else tuple(name for name in quality if score_of(name) == score)


def effects_of(content: Content, ablation: Content, columns: Columns) -> list[ArmEffects]:
    """What each arm changes that was to be run, in the plan's order."""
    return [_arm(content["baseline"], arm, columns) for arm in ablation["arms"] if arm["status"] not in NOT_RUN]


def _arm(baseline: Content, arm: Content, columns: Columns) -> ArmEffects:
    label, error = plain_text(arm["label"]), plain_text(arm.get("error") or "")
    if arm["status"] != "done":
        return ArmEffects(label, arm["status"], error=error)
    effects = tuple(compare(name, arm["metrics"], baseline["metrics"]) for name in columns.quality)
    costs = serving_costs(arm["metrics"], baseline["metrics"], columns.costs, lambda a, b: not _incomparable(a, b))
    return ArmEffects(label, "done", effects, costs, "", arm["metrics"])


def compare(metric: str, arm: Content, baseline: Content) -> Effect:
    """One metric of two models: the arm's minus the baseline's, and what may be said of it."""
    ours, theirs = arm.get(metric), baseline.get(metric)
    if reason := _incomparable(ours, theirs):
        return Effect(metric, "n/a", reason=reason)
    assert ours is not None and theirs is not None
    if min(len(ours["seeds"]), len(theirs["seeds"])) < 2:
        difference = ours["mean"] - theirs["mean"]
        same = difference == 0 and same_figures(arm, baseline)
        return Effect(metric, "identical" if same else "one seed", difference, None, 1)
    differences = paired_differences(ours, theirs)
    if differences is None:
        return Effect(metric, "n/a", reason="the arm and the baseline have no two seeds with values in common")
    return _paired(metric, differences)


def _paired(metric: str, differences: Sequence[float]) -> Effect:
    """What two or more paired differences show."""
    seeds, difference, margin = len(differences), statistics.fmean(differences), margin_of(differences)
    if not any(differences):
        return Effect(metric, "identical", 0.0, 0.0, seeds, 1.0)
    if margin is None:
        return Effect(metric, "alike", difference, None, seeds)
    return Effect(metric, _outcome(metric, difference, margin), difference, margin, seeds, p_value(differences))


def same_figures(arm: Content, baseline: Content) -> bool:
    """Whether two models' FD, KID and losses are equal, as many as both have; False where they have none."""
    names = [name for name in arm if name in baseline and re.split(r"[ (]", name)[0] in CONTINUOUS]
    pairs = [(arm[name]["mean"], baseline[name]["mean"]) for name in names]
    known = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    return bool(known) and all(ours == theirs for ours, theirs in known)


def _outcome(metric: str, difference: float, margin: float) -> Outcome:
    if abs(difference) <= margin:
        return "none"
    better = direction(metric)
    if better is None:
        return "changed"
    return "better" if (difference < 0) == (better == "lower") else "worse"


def _incomparable(ours: Figure | None, theirs: Figure | None) -> str:
    """Why two figures cannot be compared; '' where they can."""
    for who, figure in (("the arm", ours), ("the baseline", theirs)):
        if figure is None:
            return f"{who} has no such figure"
        if figure["mean"] is None:
            return plain_text(figure.get("reason", "")) or f"{who} has no value"
        if not math.isfinite(figure["mean"]):
            return f"{who}'s value is not finite"
    assert ours is not None and theirs is not None
    field = next((name for name in differing_fields(ours, theirs) if name not in CHANGEABLE), "")
    return f"measured with another {field} than the baseline" if field else ""


def differing_fields(ours: Figure, theirs: Figure) -> list[str]:
    """The fields of the protocol in which two figures differ."""
    one, other = ours["protocol"], theirs["protocol"]
    return [name for name in sorted(one.keys() | other.keys()) if compact(one.get(name)) != compact(other.get(name))]


def _serves_otherwise(content: Content, arm: Content) -> bool:
    """Whether an arm has other parameters, or is served with another sampler."""
    ours, theirs = arm.get("metrics") or {}, content["baseline"]["metrics"]
    counts = [figure["mean"] for table in (ours, theirs) if (figure := table.get("parameters"))]
    return len(set(counts) - {None}) > 1 or not same_sampler(ours, theirs)


def corrected(experiment: Sequence[Sequence[ArmEffects]]) -> list[list[ArmEffects]]:
    """Every arm of every ablation, its effects marked that also hold under Holm's correction over all of them."""
    tested = [e for arms in experiment for arm in arms for e in arm.effects if e.p is not None and e.outcome != "n/a"]
    fallen = iter(holm([effect.p for effect in tested if effect.p is not None]))

    def marked(effect: Effect) -> Effect:
        return effect if effect.p is None else replace(effect, survives=next(fallen))

    return [[replace(arm, effects=tuple(map(marked, arm.effects))) for arm in arms] for arms in experiment]


def difference_decimals(baseline: Mapping[str, Figure], arms: Sequence[ArmEffects], metric: str) -> int:
    """One number of decimals for a metric's figures, in which their differences show."""
    tables = (baseline, *(arm.metrics for arm in arms))
    figures = [f for table in tables if (f := table.get(metric)) and f["mean"] is not None]
    margins = [effect.margin or effect.difference for arm in arms if (effect := arm.of(metric))]
    return max(figure_decimals(figures), decimals_for((f["mean"] for f in figures), margins))
