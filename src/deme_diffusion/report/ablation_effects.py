"""What each arm of an ablation changes: its figures against the baseline's, seed by seed, and its cost of serving."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deme_diffusion.report.cells import SAMPLING_FIELDS, Figure, compact, direction
from deme_diffusion.report.paired import holm, margin_of, p_value, paired_differences

Content = Mapping[str, Any]
"""What `ablation.json` holds, a part of it, or an arm's `metrics`."""
Outcome = Literal["better", "worse", "changed", "none", "identical", "one seed", "n/a"]
COSTS = ("parameters", "disk (MB)", "peak memory (MB)", "load time (ms)", "latency (ms)")
CHANGEABLE = SAMPLING_FIELDS | {"eta"}
"""Fields of a protocol in which an arm may differ: it is what they change. Elsewhere a difference forbids comparing."""
NOT_RUN = ("not_executable", "same_as_baseline")


@dataclass(frozen=True)
class Effect:
    """One metric of an arm minus the baseline's: `difference` ± `margin`, half the 95% interval over paired seeds.

    Without a value for each seed the margin is sqrt(s1^2 + s2^2), and there is no p. `survives`: whether the difference
    also holds when all comparisons of the experiment are tested together (Holm).
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
    """An arm that ran, or its `error`. `ratios`: what serving it costs as a multiple of the baseline's, by metric."""

    label: str
    status: str
    effects: tuple[Effect, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    metrics: Mapping[str, Figure] = field(default_factory=dict, repr=False)

    def of(self, metric: str) -> Effect | None:
        """The effect on one metric."""
        return next((effect for effect in self.effects if effect.metric == metric), None)


@dataclass(frozen=True)
class Columns:
    """The table's metrics that an ablation asks for: of quality, of these the `primary` score's, of cost; and the rest.

    `missing` is the metrics that the recipe cannot give, each with its reason.
    """

    quality: tuple[str, ...]
    primary: tuple[str, ...]
    costs: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]


def plain_text(text: object, most: int = 0) -> str:
    """Text from a plan in one line, without control characters; longer than `most` it is cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if not most or len(line) <= most else line[: most - 1].rstrip() + "…"


def columns_of(content: Content, ablation: Content) -> Columns:
    """The asked columns that exist, FD (or the loss) where none is of quality; costs where parameters differ."""
    names = _names(content, ablation)
    asked = [name for metric in ablation["metrics"] for name in _matching(names, metric["columns"])]
    quality = [name for name in dict.fromkeys(asked) if name not in COSTS]
    quality = quality or _matching(names, ["FD"]) or _matching(names, ["loss"])
    whole = _asks_cost(asked) or any(_parameters_differ(content, arm) for arm in ablation["arms"])
    costs = tuple(c for c in COSTS if c in names) if whole else ()
    return Columns(tuple(quality), _primary(quality), costs, tuple(_missing(names, ablation)))


def _names(content: Content, ablation: Content) -> list[str]:
    tables = [content["baseline"]["metrics"], *(arm.get("metrics") or {} for arm in ablation["arms"])]
    return list(dict.fromkeys(name for table in tables for name in table))


def _matching(names: Iterable[str], prefixes: Sequence[str]) -> list[str]:
    """`FD` is any extractor's FD with any sampler; a name in full is itself."""
    starts = [(prefix, (f"{prefix}(", f"{prefix} ")) for prefix in prefixes]
    return [name for prefix, wanted in starts for name in names if name == prefix or name.startswith(wanted)]


def _asks_cost(asked: Iterable[str]) -> bool:
    return any(name in COSTS for name in asked)


def _missing(names: Sequence[str], ablation: Content) -> Iterable[tuple[str, str]]:
    for metric in ablation["metrics"]:
        if not _matching(names, metric["columns"]):
            yield plain_text(metric["asked"]), plain_text(metric["reason"] or "this recipe does not measure it")


def score_of(metric: str) -> str:
    """A metric's name without the sampler or the range: `FD(digits-cnn) DDIM-50` is the score `FD(digits-cnn)`."""
    return metric.rpartition(" ")[0] or metric


def _primary(quality: Sequence[str]) -> tuple[str, ...]:
    """The columns that the verdict speaks of first: of the first score asked for, overall rather than by range."""
    if not quality:
        return ()
    score = score_of(quality[0])
    return (score,) if score in quality else tuple(name for name in quality if score_of(name) == score)


def effects_of(content: Content, ablation: Content, columns: Columns) -> list[ArmEffects]:
    """What each arm changes that was to be run, in the plan's order."""
    return [_arm(content["baseline"], arm, columns) for arm in ablation["arms"] if arm["status"] not in NOT_RUN]


def _arm(baseline: Content, arm: Content, columns: Columns) -> ArmEffects:
    label, error = plain_text(arm["label"]), plain_text(arm.get("error") or "")
    if arm["status"] != "done":
        return ArmEffects(label, arm["status"], error=error)
    effects = tuple(compare(name, arm["metrics"], baseline["metrics"]) for name in columns.quality)
    return ArmEffects(label, "done", effects, _ratios(arm, baseline, columns.costs), "", arm["metrics"])


def compare(metric: str, arm: Content, baseline: Content) -> Effect:
    """One metric of two models: the arm's minus the baseline's, and what may be said of it."""
    ours, theirs = arm.get(metric), baseline.get(metric)
    if reason := _incomparable(ours, theirs):
        return Effect(metric, "n/a", reason=reason)
    assert ours is not None and theirs is not None
    difference, seeds = ours["mean"] - theirs["mean"], min(len(ours["seeds"]), len(theirs["seeds"]))
    differences = paired_differences(ours, theirs)
    if not any(differences) if differences else difference == 0:
        return Effect(metric, "identical", 0.0, 0.0 if differences else None, seeds, 1.0 if differences else None)
    if seeds < 2 or ours["spread"] is None or theirs["spread"] is None:
        return Effect(metric, "one seed", difference, None, seeds)
    margin = margin_of(differences) if differences else math.hypot(ours["spread"], theirs["spread"])
    p = p_value(differences) if differences else None
    return Effect(metric, _outcome(metric, difference, margin), difference, margin, seeds, p)


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


def _parameters_differ(content: Content, arm: Content) -> bool:
    counts = [_mean(table, "parameters") for table in (arm.get("metrics") or {}, content["baseline"]["metrics"])]
    return None not in counts and counts[0] != counts[1]


def _ratios(arm: Content, baseline: Content, costs: Sequence[str]) -> dict[str, float]:
    result = {}
    for name in costs:
        ours, theirs = _mean(arm["metrics"], name), _mean(baseline["metrics"], name)
        if ours is not None and theirs and not _incomparable(arm["metrics"][name], baseline["metrics"][name]):
            result[name] = ours / theirs
    return result


def _mean(metrics: Content, name: str) -> float | None:
    figure: Figure | None = metrics.get(name)
    return figure["mean"] if figure else None


def corrected(experiment: Sequence[Sequence[ArmEffects]]) -> list[list[ArmEffects]]:
    """Every arm of every ablation, its effects marked that also hold under Holm's correction over all of them."""
    tested = [e for arms in experiment for arm in arms for e in arm.effects if e.p is not None and e.outcome != "n/a"]
    fallen = iter(holm([effect.p for effect in tested if effect.p is not None]))

    def marked(effect: Effect) -> Effect:
        return effect if effect.p is None else replace(effect, survives=next(fallen))

    return [[replace(arm, effects=tuple(map(marked, arm.effects))) for arm in arms] for arms in experiment]
