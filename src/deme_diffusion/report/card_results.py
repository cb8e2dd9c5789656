"""The measured results on a model card: metrics down, models across, in tables that a hub's page can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deme_diffusion.report.card_front import COSTS
from deme_diffusion.report.cells import Row, cells, direction, metric_names, protocol_lines, reason_lines
from deme_diffusion.report.glossary import ARROWS, BEST, metric_words, row_words, spreads_said
from deme_diffusion.report.tables import escape_markdown, markdown_cell, markdown_line

KINDS = ("Quality", "Losses", "Costs")


def results(run: Mapping[str, Any]) -> str:
    """A table for quality, losses and costs each, what their words mean, and folded how each was measured."""
    rows: Sequence[Row] = run.get("table") or []
    if not rows:
        return ""
    by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in metric_names(rows):
        by_kind[_kind(name)].append(name)
    tables = [f"### {kind}\n\n{across(rows, names)}" for kind, names in by_kind.items() if names]
    notes = [*protocol_lines(rows), *reason_lines(rows)]
    told = [f"{word}: {said}" for word, said in (*row_words(rows), *metric_words(rows))]
    told += [BEST, *spreads_said(rows)]
    parts = (*tables, _listed(told), folded("How each was measured", _listed(notes)) if notes else "")
    return "\n\n".join(part for part in parts if part)


def across(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table of these metrics: models across, only those that have one of them; the best values are bold."""
    kept = [row for row in rows if any(name in row["metrics"] for name in columns)]
    lines = [markdown_line(["", *(escape_markdown(row["model"]) for row in kept)])]
    lines.append(markdown_line(["---", *["---:"] * len(kept)]))
    for metric, line in cells(kept, columns).items():
        lines.append(markdown_line([escape_markdown(metric) + ARROWS[direction(metric)], *map(markdown_cell, line)]))
    return "\n".join(lines)


def folded(title: str, body: str) -> str:
    """Markdown that a reader unfolds; the empty lines make a hub read it as such."""
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


def _kind(metric: str) -> str:
    return "Losses" if metric.split()[0] == "loss" else "Costs" if metric.startswith(COSTS) else "Quality"


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines)
