"""What a table allows one to say about the merged model, against the base and the best honest control."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deme_diffusion.report.cells import Figure, Row, direction, figure_decimals, metric_names, number
from deme_diffusion.report.paired import margin_of, paired_differences

CONTROLS = ("all-timesteps", "soup", "all-timesteps-searched")
Outcome = Literal["lower", "higher", "within", "one seed", "alike"]
UNKNOWN = frozenset({"one seed", "alike"})
"""Outcomes without an interval."""


SCORED = {"better": "better than", "worse": "worse than", "like": "the same as", "mixed": "now better, now worse than"}


@dataclass(frozen=True)
class Comparison:
    """merged minus another model: `difference` ± `margin` over `seeds` seeds each.

    With a value for each seed the margin is half of Student's 95% interval of the mean of the paired differences (the
    seeds of training and sampling are shared). A table without values, as earlier versions wrote it, has
    sqrt(s1^2 + s2^2): a rule of thumb, no interval of any stated confidence. Seeds that all differ alike give none.
    """

    metric: str
    other: str
    merged: Figure
    theirs: Figure
    difference: float
    margin: float | None
    seeds: int
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """`helps` is True only beyond the margin, everywhere; False: not shown; None: the table cannot tell."""

    sentence: str
    helps: bool | None
    comparisons: list[Comparison]


def verdict(rows: Sequence[Row]) -> Verdict:
    """Compare `merged` with `base` and the best control present, in every FD column, or else by CLIP score.

    Where there is FD, a CLIP score is told beside: one that fell beyond the margin leaves no gain. FD of images no more
    than their features, which is mostly bias, decides nothing: KID, which has none, takes its place.
    """
    fd, kid, clip = (_compared(rows, word) for word in ("FD", "KID", "CLIP"))
    few = _few(rows)
    sound = [pair for pair in fd if pair[0].metric not in few]
    first = sound or (kid if few else [])
    pairs, beside = (first, clip) if first else (clip, [])
    if not pairs and few:
        return Verdict(f"{_biased(few)}, so nothing can be concluded.", None, [])
    if not pairs:
        return Verdict("The table has no FD of both merged and base, so nothing can be concluded.", None, [])
    comparisons = [comparison for pair in pairs for comparison in pair]
    fell = [comparison for pair in beside for comparison in pair if comparison.outcome == "lower"]
    helps = _helps(pairs) if not fell else False
    sentences = [*(_sentence(pair) for pair in pairs), *(_sentence(pair) for pair in beside)]
    if few:
        decides = pairs[0][0].metric.partition("(")[0]
        sentences.insert(0, f"{_biased(few)}: {decides} decides.")
    return Verdict(" ".join([*sentences, _conclusion(comparisons, helps, fell)]), helps, comparisons)


def _few(rows: Sequence[Row]) -> dict[str, Figure]:
    """The FD columns of merged whose protocol says that images are no more than features, on either side."""
    found = [row["metrics"] for row in rows if row["model"] == "merged"]
    figures = {name: figure for metrics in found for name, figure in metrics.items() if name.startswith("FD(")}
    return {name: figure for name, figure in figures.items() if "features" in figure["protocol"]}


def _biased(few: Mapping[str, Figure]) -> str:
    figure = next(iter(few.values()))
    images, features = (f"{int(number):,}" for number in (figure["n"], figure["protocol"]["features"]))
    reference = figure["protocol"].get("reference")
    against = f" against {reference:,}" if isinstance(reference, int) else ""
    return f"FD of {images} images{against} in {features} features is mostly bias"


def _compared(rows: Sequence[Row], word: str) -> list[list[Comparison]]:
    """The comparisons of each column of a score."""
    models = {row["model"]: row["metrics"] for row in rows}
    pairs = (_compare_column(models, name) for name in metric_names(rows) if re.split(r"[ (]", name)[0] == word)
    return [pair for pair in pairs if pair]


def _compare_column(models: dict[str, dict[str, Figure]], metric: str) -> list[Comparison]:
    """[against base, against the best control, where one is present]; empty where merged or base has no figure."""
    means = {name: f["mean"] for name, figures in models.items() if (f := figures.get(metric))}
    known = {name: mean for name, mean in means.items() if mean is not None and math.isfinite(mean)}
    if "merged" not in known or "base" not in known:
        return []
    sign = -1 if direction(metric) == "higher" else 1
    others = ["base", *sorted((c for c in CONTROLS if c in known), key=lambda c: sign * known[c])[:1]]
    return [_compare(metric, other, models["merged"][metric], models[other][metric]) for other in others]


def _compare(metric: str, other: str, merged: Figure, theirs: Figure) -> Comparison:
    assert merged["mean"] is not None and theirs["mean"] is not None
    difference = merged["mean"] - theirs["mean"]
    seeds = min(len(merged["seeds"]), len(theirs["seeds"]))
    if seeds < 2 or merged["spread"] is None or theirs["spread"] is None:
        return Comparison(metric, other, merged, theirs, difference, None, seeds, "one seed")
    differences = paired_differences(merged, theirs)
    margin = _margin(differences) if differences else math.hypot(merged["spread"], theirs["spread"])
    if margin is None:
        return Comparison(metric, other, merged, theirs, difference, None, seeds, "alike")
    outcome: Outcome = "within" if abs(difference) <= margin else "lower" if difference < 0 else "higher"
    return Comparison(metric, other, merged, theirs, difference, margin, seeds, outcome)


def _margin(differences: Sequence[float]) -> float | None:
    return margin_of(differences) if any(differences) else 0.0


def _helps(pairs: Sequence[Sequence[Comparison]]) -> bool | None:
    outcomes = {comparison.outcome for pair in pairs for comparison in pair}
    if outcomes & UNKNOWN:
        return None
    if any(comparison.outcome != direction(comparison.metric) for pair in pairs for comparison in pair):
        return False
    return True if all(len(pair) == 2 for pair in pairs) else None


def _sentence(pair: Sequence[Comparison]) -> str:
    figures = [pair[0].merged, *(c.theirs for c in pair)]
    decimals = figure_decimals(figures)
    merged, *theirs = (number(figure, decimals) for figure in figures)
    metric = pair[0].metric
    if any(c.outcome in UNKNOWN for c in pair):
        listed = " and ".join(f"{c.other}'s {text}" for c, text in zip(pair, theirs, strict=True))
        return f"merged has {metric} {merged} against {listed}."
    start = _against_base(pair[0], f"{merged} against {theirs[0]}")
    return start + (_against_control(pair[0].outcome, pair[1], theirs[1]) if len(pair) == 2 else ".")


def _against_base(c: Comparison, numbers: str) -> str:
    if c.outcome == "within":
        return f"merged and base ({numbers}) have no difference in {c.metric} that {c.seeds} seeds can show"
    return f"merged has {c.outcome} {c.metric} than base ({numbers})"


def _against_control(base: Outcome, c: Comparison, figure: str) -> str:
    """The rest of the sentence; it reads differently after a gain over the base than after none."""
    control, nothing = f"{c.other} ({figure})", f"no difference that {c.seeds} seeds can show"
    better = direction(c.metric) or "lower"
    if c.outcome == "within":
        return f", but not than {control}: {nothing}." if base == better else f"; against {control}, {nothing}."
    if base == better:
        return f", and than {control}." if c.outcome == better else f", but not than {control}, which is {better}."
    return f"; it is {better} than {control}." if c.outcome == better else f"; {control} is {better}."


def _conclusion(comparisons: Sequence[Comparison], helps: bool | None, fell: Sequence[Comparison]) -> str:
    if any(c.outcome == "one seed" for c in comparisons):
        return f"{_scored(comparisons)} Nothing can be concluded from one training seed."
    if alike := next((c for c in comparisons if c.outcome == "alike"), None):
        return f"All {alike.seeds} seeds differ alike in {alike.metric}, which gives no interval to conclude from."
    if fell:
        than = " and ".join(dict.fromkeys(c.other for c in fell))
        return f"So decouple-then-merge is not shown to help here: images fit their prompts less than {than}'s."
    if helps is None:
        kind = comparisons[0].metric.partition("(")[0]
        return f"Without a control of equal budget in every {kind} column, the gain cannot be credited to decoupling."
    if helps:
        return "So here decouple-then-merge helps."
    return "So decouple-then-merge is not shown to help here."


def _scored(comparisons: Sequence[Comparison]) -> str:
    """The signs of the differences in words, which claim nothing: `merged scored worse than base by both samplers.`"""
    columns = list(dict.fromkeys(c.metric for c in comparisons))
    alike = {metric.split(" ")[0] for metric in columns}
    each = "samplers" if len(alike) == 1 else "scores" if comparisons[0].metric.startswith("CLIP") else "FDs"
    by = "" if len(columns) < 2 else f" by both {each}" if len(columns) == 2 else f" by all {len(columns)} {each}"
    words: dict[str, set[str]] = {}
    for c in comparisons:
        words.setdefault(c.other, set()).add(_word(c))
    told: dict[str, list[str]] = {}
    for other, found in words.items():
        told.setdefault(found.pop() if len(found) == 1 else "mixed", []).append(other)
    parts = [f"{SCORED[word]} {' and '.join(others)}" for word, others in told.items()]
    return f"merged scored {', '.join(parts)}{'' if 'mixed' in told else by}."


def _word(c: Comparison) -> str:
    """Of the means as they are printed; a lower FD is better, a higher CLIP score."""
    decimals = figure_decimals([c.merged, c.theirs])
    ours, theirs = (number(figure, decimals).split(" ")[0] for figure in (c.merged, c.theirs))
    outcome = "lower" if c.difference < 0 else "higher"
    return "like" if ours == theirs else "better" if outcome == direction(c.metric) else "worse"
