"""What `deme merge --base` prints: the methods, what a merge would do, and what came of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from deme_diffusion.cli.show import as_json, say
from deme_diffusion.config import MethodOptions
from deme_diffusion.merging.table import METHODS
from deme_diffusion.processes import is_main

if TYPE_CHECKING:
    from rich.table import Table

Told = Mapping[str, Any]


def methods() -> None:
    """The table of methods: what each does, its options with their defaults, its source."""
    for row in METHODS.values():
        options = ", ".join(f"{name}={_or_null(value)}" for name, value in row.defaults.items()) or "none"
        weights = "none" if not row.weighted else "1 each" if row.ones else "1/N each"
        weights += ", of which only the ratios count" if row.relative else ""
        needs = f"; {row.experts} experts" if row.experts else "; --fisher a file an expert" if row.fisher else ""
        told = f"  options: {options}; weights: {weights}{needs}"
        explained = [f"    {name}: {MethodOptions.model_fields[name].description}" for name in row.options]
        say(row.name, f"  {row.what}", told, *explained, f"  {row.source}")


def plan(told: Told, in_json: bool) -> None:
    """The dry run of a merge of checkpoints."""
    if in_json:
        as_json(told)
        return
    from deme_diffusion.merging.perform import told_estimate

    say(*told["notes"], _how(told), f"dtype: {told['dtype']}")
    for name, size in told["shards"].items():
        say(f"to write: {name} ({_size(size)})")
    if told["estimate"]:
        say(told_estimate(told["estimate"]))
    if lora := told.get("lora"):
        say(f"one LoRA: {lora['layers']} layers, rank {lora['rank']}")
    checked = "names, shapes, configs and space were checked; values are checked while merging; nothing is written"
    say(f"out: {told['out']}, {_size(told['bytes'])} of weights; {checked}")


def done(told: Told, out: Path, in_json: bool) -> None:
    """A merge of checkpoints that was made: its table, and where the model lies."""
    if in_json:
        as_json({"out": str(out), **told})
        return
    if not is_main():
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)  # a pipe has no width of its own
    console.print(table(told))
    if lora := told.get("lora"):
        lost = "exact" if lora["exact"] else f"relative error {lora['relative_error']:.3g}"
        say(f"one LoRA: {lora['layers']} layers, rank {lora['rank']}, {lost}")
    say(_how(told), out)


def table(told: Told) -> Table:
    """A row a layer group: parameters, relative norms, cosines and overlap (mean and least), weights."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    seen = told["statistics"]
    rows = [*seen["groups"].items(), ("model", seen["model"])]
    several = len(told["experts"]) > 1
    differ = any(key in told["weights"] for key in ("rules", "keep"))
    heads = ["parameters", "|tau|/|theta|, %" + (" (one an expert)" if several else "")]
    heads += ["cosine mean", "least", "overlap mean", "least"] if several else []
    heads += ["weights"] if differ else []
    grid = Table(box=SIMPLE_HEAD, show_edge=False, caption_justify="left")
    grid.caption = Text(_caption(seen["model"]["share_seen"], several, "projection" in seen["groups"]))
    grid.add_column("")
    for head in heads:
        grid.add_column(head, justify="right")
    for name, row in rows:
        figures = [f"{row['parameters']:,}", " ".join(_percent(norm) for norm in row["relative_norms"])]
        figures += [*_mean_and_least(row["cosines"]), *_mean_and_least(row["overlaps"])] if several else []
        figures += ["" if name == "model" else _weights(row.get("weights"))] if differ else []
        grid.add_row(Text(name), *figures)
    return grid


def _caption(share: float, several: bool, projected: bool) -> str:
    pairs = "; cosine and overlap of magnitudes between two task vectors, over their pairs" if several else ""
    rest = "" if share == 1 else f"; from {share:.0%} of the entries"
    rest += "; projection: all projections, whose theta is 0" if projected else ""
    return f"tau_i = expert i - base, theta = base{pairs}{rest}"


def _mean_and_least(matrix: Sequence[Sequence[float | None]]) -> list[str]:
    values = [matrix[i][j] for i, j in combinations(range(len(matrix)), 2)]
    known = [value for value in values if value is not None]
    return [f"{fmean(known):.3f}", f"{min(known):.3f}"] if known else ["-", "-"]


def _percent(norm: float | None) -> str:
    return "-" if norm is None else f"{100 * norm:.3g}"


def _weights(told: Any) -> str:
    if told is None:
        return "several"
    if isinstance(told, list):
        return " ".join(f"{weight:.3g}" for weight in told)
    return "base" if told == "base" else f"expert {told}"


def _how(told: Told) -> str:
    options = "".join(f" {name}={_or_null(value)}" for name, value in told["options"].items())
    rules = "".join(f"; {p}: {_numbers(w)}" for p, w in told["weights"].get("rules", {}).items())
    kept = "".join(f"; {p}: {_weights(who)}" for p, who in told["weights"].get("keep", {}).items())
    weights = f"weights {_numbers(told['weights']['values'])} ({told['weights_source']})"
    return f"{told['method']}{options}, {weights}{rules}{kept}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _or_null(value: object) -> object:
    return "null" if value is None else value


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
