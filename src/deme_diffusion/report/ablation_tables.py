"""An ablation as a table: the base, the baseline and every arm, with its notes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deme_diffusion.report.ablation_costs import LATENCY
from deme_diffusion.report.ablation_effects import (
    NOT_RUN,
    ArmEffects,
    Content,
    Effect,
    difference_decimals,
    differing_fields,
    plain_text,
)
from deme_diffusion.report.ablation_samplers import resampled, samplers_said
from deme_diffusion.report.ablation_sentences import AblationVerdict
from deme_diffusion.report.cells import (
    Figure,
    compact,
    difference_said,
    direction,
    figure_decimals,
    number,
    plain,
    protocol_lines,
    ratio,
)

Kind = Literal["base", "baseline", "arm", "failed"]
SAMPLER_FIELDS = ("sampler", "steps", "eta")
MARK = "*"
"""Marks a figure that stands under the name of a sampler that it was not sampled by."""


@dataclass(frozen=True)
class TableCell:
    """One value; `better` and `worse` are said of a difference beyond its interval."""

    text: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Line:
    """One row. A failed or missing arm has its `error` in place of cells."""

    kind: Kind
    label: str
    change: str
    cells: tuple[TableCell, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class AblationTable:
    """Heads and rows, what marks in cells mean, notes, and the arms that were not to be run, each with its reason."""

    heads: tuple[str, ...]
    lines: tuple[Line, ...]
    marks: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]


def table_of(content: Content, ablation: Content, found: AblationVerdict) -> AblationTable:
    """The table of one ablation, by what `found` shows of it."""
    columns, baseline = found.columns, content["baseline"]
    heads = [part for name in columns.quality for part in (f"{name}{_arrow(name)}", "Δ")]
    heads += [*(f"{name}{_arrow(name)}" for name in columns.costs), "steps", "seconds"]
    rows = [arm for arm in ablation["arms"] if arm["status"] not in NOT_RUN]
    shown = _Shown(content, found)
    lines = [Line("base", "base", "", shown.base())] if content.get("base") else []
    lines.append(Line("baseline", "baseline", "", shown.baseline(baseline)))
    lines += [shown.arm(arm, effects) for arm, effects in zip(rows, found.arms, strict=True)]
    notes = [*_missing(found), *_remarks(rows, found.arms, baseline)]
    marks = _marks(rows, baseline["metrics"], columns.quality)
    return AblationTable(tuple(heads), tuple(lines), tuple(marks), tuple(notes), tuple(_left_out(ablation)))


class _Shown:
    """Cells of one ablation, with one number of decimals for each column."""

    def __init__(self, content: Content, found: AblationVerdict) -> None:
        self.content, self.columns = content, found.columns
        self.decimals = {name: difference_decimals(content["baseline"]["metrics"], found.arms, name)
                         for name in found.columns.quality}  # fmt: skip
        tables = [content["baseline"]["metrics"], *(arm.metrics for arm in found.arms)]
        for name in found.columns.costs:
            self.decimals[name] = figure_decimals(
                f for table in tables if (f := table.get(name)) and f["mean"] is not None
            )

    def base(self) -> tuple[TableCell, ...]:
        return self._cells(self.content["base"]["metrics"], None)

    def baseline(self, baseline: Content) -> tuple[TableCell, ...]:
        return self._cells(baseline["metrics"], None, baseline)

    def arm(self, arm: Content, effects: ArmEffects) -> Line:
        label, change = plain_text(arm["label"]), change_said(arm)
        if arm["status"] == "done":
            return Line("arm", label, change, self._cells(arm["metrics"], effects, arm))
        error = (
            f"failed: {plain_text(arm.get('error') or 'no reason given')}" if arm["status"] == "failed" else "not run"
        )
        return Line("failed", label, change, (), error)

    def _cells(
        self, metrics: Content, effects: ArmEffects | None, timed: Content | None = None
    ) -> tuple[TableCell, ...]:
        cells = []
        theirs = self.content["baseline"]["metrics"]
        for name in self.columns.quality:
            mark = MARK if effects and resampled(metrics.get(name), theirs.get(name)) else ""
            cells += [
                TableCell(self._value(metrics, name) + mark),
                self._difference(effects.of(name) if effects else None),
            ]
        for name in self.columns.costs:
            cells.append(TableCell(self._value(metrics, name) + _times(effects, name)))
        steps, seconds = (timed.get("steps"), timed.get("seconds")) if timed else (None, None)
        cells.append(TableCell("" if steps is None else f"{steps:,}"))
        return (*cells, TableCell("" if seconds is None else f"{seconds:,.1f}"))

    def _value(self, metrics: Content, name: str) -> str:
        return number(metrics[name], self.decimals[name]) if name in metrics else ""

    def _difference(self, effect: Effect | None) -> TableCell:
        if effect is None:
            return TableCell()
        if effect.difference is None:
            return TableCell("n/a")
        said = difference_said(effect.difference, effect.margin)
        text = "identical" if effect.outcome == "identical" else said
        return TableCell(text, effect.outcome if effect.outcome in ("better", "worse") else "")


def _times(effects: ArmEffects | None, cost: str) -> str:
    """` (4.0x)`, of an image where a step's time is shown; '' where nothing is to be told."""
    if effects is None or cost not in effects.serving.ratios:
        return ""
    return f" ({ratio(effects.serving.ratios[cost])}{' per image' if cost == LATENCY else ''})"


def change_said(arm: Content) -> str:
    """`decouple.num_ranges=2, merge.method=none`."""
    settings = (arm.get("change") or {}).items()
    return plain_text(", ".join(f"{path}={_setting(value)}" for path, value in settings))


def _setting(value: Any) -> str:
    return plain(value) if isinstance(value, str) else samplers_said(value) or compact(value)


def _arrow(metric: str) -> str:
    return {"lower": " ↓", "higher": " ↑", None: ""}[direction(metric)]


def _missing(found: AblationVerdict) -> Iterable[str]:
    """The metrics that were asked for and cannot be given."""
    return (f"{asked}: n/a ({reason})" for asked, reason in found.columns.missing)


def _marks(rows: Sequence[Content], baseline: Content, names: Sequence[str]) -> Iterable[str]:
    """`* sampled by DDIM-6 in place of DDIM-3 (6 steps)`: what the marks mean, a line for each two samplers."""
    arms: dict[str, list[str]] = {}
    for arm in rows if names else ():
        metrics = (arm.get("metrics") or {}) if arm["status"] == "done" else {}
        pairs = [pair for name in names if (pair := resampled(metrics.get(name), baseline.get(name)))]
        for ours, theirs in dict.fromkeys(pairs):
            arms.setdefault(f"{MARK} sampled by {ours} in place of {theirs}", []).append(plain_text(arm["label"]))
    ran = sum(arm["status"] == "done" for arm in rows)
    return [f"{said} ({', '.join(labels)})" if ran > 1 else said for said, labels in arms.items()]


def _remarks(rows: Sequence[Content], arms: Sequence[ArmEffects], baseline: Content) -> Iterable[str]:
    """Why a difference is missing, and in what an arm was measured otherwise."""
    for arm, effects in zip(rows, arms, strict=True):
        for effect in effects.effects:
            if effect.outcome == "n/a":
                yield f"n/a ({effects.label}, {effect.metric}): {effect.reason}"
            elif said := _otherwise(arm["metrics"][effect.metric], baseline["metrics"][effect.metric]):
                yield f"{effects.label}, {effect.metric}: {said}"


def _otherwise(ours: Figure, theirs: Figure) -> str:
    one, other = ours["protocol"], theirs["protocol"]
    marked = SAMPLER_FIELDS if resampled(ours, theirs) else ()
    return ", ".join(f"{name} {plain(one.get(name))} instead of {plain(other.get(name))}"
                     for name in differing_fields(ours, theirs) if name not in marked)  # fmt: skip


def protocols_of(content: Content, found: Sequence[AblationVerdict]) -> list[str]:
    """How the figures of all tables were measured: one line per distinct protocol, the baseline's."""
    metrics: Mapping[str, Figure] = content["baseline"]["metrics"]
    asked = [name for one in found for name in (*one.columns.quality, *one.columns.costs)]
    shown = [name for name in metrics if name in asked]
    return [plain_text(line) for line in protocol_lines([{"model": "baseline", "metrics": dict(metrics)}], shown)]


def _left_out(ablation: Content) -> Iterable[str]:
    """The arms that no run can have, with the reason and what comes closest."""
    for arm in ablation["arms"]:
        if arm["status"] in NOT_RUN:
            what = "the same as the baseline" if arm["status"] == "same_as_baseline" else "not executable"
            reason = plain_text(arm.get("reason") or "")
            nearest = ", ".join(plain_text(name) for name in arm.get("nearest") or ())
            said = ": ".join(part for part in (what, reason) if part)
            yield f"{plain_text(arm['label'])}: {said}{f' (nearest: {nearest})' if nearest else ''}"


def has_rows(table: AblationTable) -> bool:
    """Whether any arm was to be run: else a table would show the baseline alone."""
    return any(line.kind in ("arm", "failed") for line in table.lines)
