"""What one cell of a table says: its digits, which value is best, and the protocol behind it."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from deme_diffusion.errors import UserError

REAL_IMAGES = "training images"
SAMPLING_FIELDS = frozenset(
    {"sampler", "steps", "seeds", "prompts", "guidance", "texts cut"}
)  # real images are scored alike, but nothing samples them
PROTOCOL_ORDER = ("extractor", "preprocessing", "sampler", "steps", "n", "seeds", "split")
BETTER: dict[str, Literal["lower", "higher"]] = {
    "fd": "lower",
    "kid": "lower",
    "loss": "lower",
    "latency": "lower",
    "load": "lower",
    "memory": "lower",
    "disk": "lower",
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
    "is": "higher",
    "clip": "higher",
}


class Figure(TypedDict):
    """One metric of one model: mean and spread (standard deviation) over seeds; no mean only with a reason.

    `values`, where there are several seeds, are in their order: what paired differences are taken on. `error`: the
    standard error of a mean over images.
    """

    mean: float | None
    spread: float | None
    n: int
    seeds: list[int]
    protocol: dict[str, Any]
    reason: NotRequired[str]
    values: NotRequired[list[float]]
    error: NotRequired[float]


class Row(TypedDict):
    """One model and its figures by metric name."""

    model: str
    metrics: dict[str, Figure]


@dataclass(frozen=True)
class Cell:
    """A formatted figure; `text` is empty where the row lacks the metric, `reason` says why there is no mean."""

    text: str = ""
    best: bool = False
    reason: str = ""


def direction(metric: str) -> Literal["lower", "higher"] | None:
    """Whether lower or higher values of this metric are better, where known."""
    words = re.findall(r"[a-z]+", metric.split("(")[0].lower())
    return next((BETTER[word] for word in words if word in BETTER), None)


def metric_names(rows: Sequence[Row]) -> list[str]:
    """Every metric of the table, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def chosen(rows: Sequence[Row], columns: Sequence[str] | None) -> list[str]:
    """The columns asked for, or all of them; a column that no row has is refused."""
    names = metric_names(rows)
    for column in columns or ():
        if column not in names:
            raise UserError(f"the table has no metric {column!r}; it has {', '.join(names)}")
    return names if columns is None else list(columns)


def cells(rows: Sequence[Row], columns: Sequence[str] | None = None) -> dict[str, list[Cell]]:
    """Formatted figures: metric -> one cell per row, with one number of decimals per metric."""
    return {metric: _column(rows, metric) for metric in chosen(rows, columns)}


def number(figure: Figure, decimals: int) -> str:
    """`mean ± spread` with thousands separators; only the mean where there is no spread."""
    mean, spread = figure["mean"], figure["spread"]
    if mean is None:
        return "n/a"
    text = _fixed(mean, decimals)
    return text if spread is None else f"{text} ± {_fixed(spread, decimals)}"


def signed(difference: float, margin: float | None, decimals: int) -> str:
    """`+0.80 ± 0.20`, `−0.03` where nothing is known of the margin."""
    size = _fixed(abs(difference), decimals)
    sign = "" if not float(size.replace(",", "")) else "\N{MINUS SIGN}" if difference < 0 else "+"
    return f"{sign}{size}" if margin is None else f"{sign}{size} ± {_fixed(margin, decimals)}"


def difference_said(difference: float, margin: float | None) -> str:
    """A difference with digits of its own: two significant ones of its margin, or of itself where it has none."""
    told = margin or difference
    return signed(difference, margin, _decimals(told, 2) if told and math.isfinite(told) else 0)


def ratio(value: float) -> str:
    """`4.0x`, `0.98x`, `12x`: two or three digits, more where it is near 1."""
    return f"{value:.{2 if value < 1.095 else 1 if value < 9.95 else 0}f}x"


def decimals_for(means: Iterable[float | None], spreads: Iterable[float | None] = ()) -> int:
    """Decimals that give each mean about 3 significant digits and let the median spread show, within reason.

    Of a few seeds, two may agree by chance: the least spread would print digits that mean nothing.
    """
    wanted = [_decimals(mean, 3) for mean in means if mean and math.isfinite(mean)]
    showing = [_decimals(spread, 1) for spread in spreads if spread and math.isfinite(spread)]
    base = min(max(wanted, default=0), min(wanted, default=0) + 1)
    return min(max(base, statistics.median_low(showing) if showing else 0), base + 2)


def figure_decimals(figures: Iterable[Figure]) -> int:
    """One number of decimals for figures that are read together."""
    figures = list(figures)
    return decimals_for((f["mean"] for f in figures), (f["spread"] for f in figures))


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def _fixed(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"  # + 0.0 turns -0.0 into 0.0


def _column(rows: Sequence[Row], metric: str) -> list[Cell]:
    figures = [row["metrics"].get(metric) for row in rows]
    decimals = figure_decimals(f for f in figures if f is not None)
    best = _best_text(rows, metric, decimals)
    return [_cell(row, figure, decimals, best) for row, figure in zip(rows, figures, strict=True)]


def _cell(row: Row, figure: Figure | None, decimals: int, best: str | None) -> Cell:
    if figure is None:
        return Cell()
    mean = figure["mean"]
    is_best = mean is not None and row["model"] != REAL_IMAGES and _fixed(mean, decimals) == best
    return Cell(number(figure, decimals), is_best, figure.get("reason", "") if mean is None else "")


def _best_text(rows: Sequence[Row], metric: str, decimals: int) -> str | None:
    """The best mean as printed; None without a direction, where all print alike, or where times overlap."""
    figures = (row["metrics"].get(metric) for row in rows if row["model"] != REAL_IMAGES)
    scored = [f for f in figures if f and f["mean"] is not None and math.isfinite(f["mean"])]
    means = [f["mean"] for f in scored if f["mean"] is not None]
    better = direction(metric)
    if better is None or len({_fixed(mean, decimals) for mean in means}) < 2:
        return None
    if any("statistic" in f["protocol"] for f in scored) and _overlaps(scored):
        return None
    return _fixed(min(means) if better == "lower" else max(means), decimals)


def _overlaps(times: Sequence[Figure]) -> bool:
    """Whether the repeats of the least time (median ± half the range) reach those of another model."""
    ranges = [(f["mean"] - (f["spread"] or 0), f["mean"] + (f["spread"] or 0)) for f in times if f["mean"] is not None]
    (_, least), *others = sorted(ranges, key=sum)
    return any(low <= least for low, _ in others)


def protocol_lines(rows: Sequence[Row], columns: Sequence[str] | None = None) -> list[str]:
    """One line per distinct protocol: the metrics that share it, then its fields."""
    groups: dict[str, list[str]] = {}
    for metric in chosen(rows, columns):
        if text := protocol_text(rows, metric):
            groups.setdefault(text, []).append(metric)
    return [f"{', '.join(metrics)}: {text}" for text, metrics in groups.items()]


def reason_lines(rows: Sequence[Row], columns: Sequence[str] | None = None) -> list[str]:
    """One line per figure that is not applicable: which, and why."""
    table = cells(rows, columns)
    return [
        f"n/a ({row['model']}, {metric}): {cell.reason}"
        for metric, line in table.items()
        for row, cell in zip(rows, line, strict=True)
        if cell.reason
    ]


def protocol_text(rows: Sequence[Row], metric: str) -> str:
    """How a metric was measured, `sampler DDIM; steps 50; n 2,000`; empty where it has no protocol."""
    scored = [row for row in rows if (f := row["metrics"].get(metric)) and f["mean"] is not None]
    figures = [row["metrics"][metric] for row in scored if row["model"] != REAL_IMAGES or len(scored) == 1]
    if not figures or not figures[0]["protocol"]:
        return ""
    fields = {"n": _sizes(figures), "seeds": _seeds(figures), **figures[0]["protocol"]}
    fields |= {"standard error over images": error} if (error := _errors(figures)) else {}
    order = [k for k in PROTOCOL_ORDER if k in fields] + sorted(set(fields) - set(PROTOCOL_ORDER))
    return "; ".join(f"{key} {plain(fields[key])}" for key in order if fields[key] not in (None, "", []))


def _sizes(figures: Sequence[Figure]) -> str:
    low, high = min(f["n"] for f in figures), max(f["n"] for f in figures)
    return "" if high <= 1 else f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _errors(figures: Sequence[Figure]) -> str:
    """Of means over images: `0.04`, `0.04 to 0.06`."""
    errors = [f"{figure['error']:.2g}" for figure in figures if "error" in figure]
    return " to ".join(dict.fromkeys((min(errors, key=float), max(errors, key=float)))) if errors else ""


def _seeds(figures: Sequence[Figure]) -> str:
    lists = [f["seeds"] for f in figures]
    if all(seeds == lists[0] for seeds in lists):
        return ", ".join(map(str, lists[0]))
    return f"{min(map(len, lists))} to {max(map(len, lists))} a model"


def plain(value: object) -> str:
    """A protocol's value for people: 2,000 rather than 2000, `0, 1` rather than `[0, 1]`."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    return compact(value)


def compact(value: object) -> str:
    """Canonical one-line JSON, so that a tuple equals a list and key order is nothing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
