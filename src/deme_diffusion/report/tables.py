"""Tables of figures: unlike protocols are refused; markdown, CSV, JSON and the terminal show the same cells."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from deme_diffusion.errors import UserError
from deme_diffusion.files import write_json, write_text
from deme_diffusion.report.cells import (
    REAL_IMAGES,
    SAMPLING_FIELDS,
    Cell,
    Figure,
    Row,
    cells,
    compact,
    metric_names,
    protocol_lines,
    reason_lines,
)

__all__ = [
    "Figure",
    "Row",
    "check_protocols",
    "escape_markdown",
    "markdown",
    "markdown_cell",
    "markdown_line",
    "merge_tables",
    "paragraph",
    "read_table",
    "rich_table",
    "to_csv",
    "write_table",
]

CSV_HEADER = ("model", "metric", "mean", "spread", "n", "seeds", "protocol", "reason")
NAME_WIDTH = 14  # at least, in the terminal


def check_protocols(rows: Sequence[Row]) -> None:
    """Refuse a table in which one metric was measured in two ways (UserError: metric, both models, field)."""
    for metric in metric_names(rows):
        scored = [row for row in rows if (f := row["metrics"].get(metric)) and f["mean"] is not None]
        scored.sort(key=lambda row: row["model"] == REAL_IMAGES)  # a stable sort: real images are compared last
        for row in scored[1:]:
            _check_pair(metric, scored[0], row)


def _check_pair(metric: str, one: Row, other: Row) -> None:
    left, right = one["metrics"][metric]["protocol"], other["metrics"][metric]["protocol"]
    skipped = SAMPLING_FIELDS if other["model"] == REAL_IMAGES != one["model"] else frozenset()
    for field in sorted((left.keys() | right.keys()) - skipped):
        if compact(left.get(field)) != compact(right.get(field)):
            raise UserError(
                f"metric {metric!r} of {one['model']!r} and of {other['model']!r} differs in its protocol's {field}"
                f" ({_short(left.get(field))} against {_short(right.get(field))}), so they cannot share a table"
            )


def _short(value: object) -> str:
    text = compact(value)
    return text if len(text) <= 60 else text[:59] + "…"


def merge_tables(tables: Sequence[Sequence[Row]], labels: Sequence[str] | None = None) -> list[Row]:
    """Rows of several tables in one; a model that two tables score differently gets its table's label."""
    labels = labels or [str(i + 1) for i in range(len(tables))]
    everything = [row for table in tables for row in table]
    check_protocols(everything)
    clashing = {row["model"] for row in everything for other in everything if _clash(row, other)}
    merged: dict[str, Row] = {}
    for label, table in zip(labels, tables, strict=True):
        for row in table:
            name = f"{row['model']} ({label})" if row["model"] in clashing else row["model"]
            merged[name] = {"model": name, "metrics": row["metrics"]}
    return list(merged.values())


def _clash(row: Row, other: Row) -> bool:
    return row["model"] == other["model"] and compact(row["metrics"]) != compact(other["metrics"])


def escape_markdown(text: str) -> str:
    """Text that neither breaks a table's cell nor becomes HTML, emphasis, code or a link."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    for mark, safe in (("\\", "\\\\"), ("<", "&lt;"), ("](", "]\\("), *((mark, f"\\{mark}") for mark in "|*`~")):
        text = text.replace(mark, safe)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", " ".join(text.split()))


def paragraph(text: str) -> str:
    """The same as a paragraph of its own: what begins it is no heading, list, rule, quotation or reference either."""
    text = escape_markdown(text)
    return re.sub(r"^(?:(?=[#>=+\-\[])|\d+(?=[.)]))", lambda found: f"{found[0]}\\", text)


def markdown(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """The table as markdown, best values bold, with one line per distinct protocol below."""
    table = cells(rows, columns)
    lines = [markdown_line(["model", *map(escape_markdown, table)]), markdown_line(["---", *["---:"] * len(table)])]
    for index, row in enumerate(rows):
        lines.append(
            markdown_line([escape_markdown(row["model"]), *(markdown_cell(column[index]) for column in table.values())])
        )
    notes = protocol_lines(rows, columns) + reason_lines(rows, columns)
    return "\n".join(lines + [""] * bool(notes) + [f"- {escape_markdown(note)}" for note in notes]) + "\n"


def markdown_line(texts: Sequence[str]) -> str:
    """A row of a markdown table, of texts that are escaped already."""
    return f"| {' | '.join(texts)} |"


def markdown_cell(cell: Cell) -> str:
    """A cell as markdown, the best value bold."""
    return f"**{cell.text}**" if cell.best else cell.text


def to_csv(rows: Sequence[Row]) -> str:
    """One line per model and metric, at full precision; seeds and protocol as compact JSON.

    Standard errors of means over images have a column of their own where there are any.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    has_errors = any("error" in figure for row in rows for figure in row["metrics"].values())
    writer.writerow((*CSV_HEADER, *(["standard_error"] if has_errors else [])))
    for row in rows:
        for metric, f in row["metrics"].items():
            numbers = (f["mean"], f["spread"], f["n"])
            lists = (compact(f["seeds"]), compact(f["protocol"]))
            error = [f.get("error", "")] if has_errors else []
            writer.writerow((row["model"], metric, *numbers, *lists, f.get("reason", ""), *error))
    return out.getvalue()


def rich_table(rows: Sequence[Row], columns: Sequence[str] | None = None, width: int | None = None) -> Table:
    """The table for the terminal; more metrics than models turn it, too small a `width` drops the spreads."""
    grid = cells(rows, columns)
    heads, names, lines = [row["model"] for row in rows], list(grid), list(grid.values())
    notes = protocol_lines(rows, columns) + reason_lines(rows, columns)
    if grid and len(names) <= len(heads):
        heads, names, lines = names, heads, [list(line) for line in zip(*lines, strict=True)]
    narrow = bool(grid) and width is not None and _needed_width(lines, gap=3) > width
    if narrow:
        lines = [[replace(cell, text=cell.text.split(" ± ")[0]) for cell in line] for line in lines]
        notes.append("too narrow for the spreads, which the written table has")
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0 if narrow else (0, 1), caption_justify="left")
    table.caption = Text("\n".join(notes)) if notes else None
    first, *others = _fixed_widths(names, lines, width) if narrow and width else [None] * (1 + len(heads))
    table.add_column("", overflow="fold", width=first)
    for head, fixed in zip(heads, others, strict=True):
        table.add_column(Text(head), justify="right", overflow="fold", width=fixed)
    for name, line in zip(names, lines, strict=True):
        table.add_row(Text(name), *(Text(cell.text, style="bold" if cell.best else "") for cell in line))
    return table


def _widths(lines: Sequence[Sequence[Cell]]) -> list[int]:
    return [max(len(cell.text) for cell in column) for column in zip(*lines, strict=True)]


def _needed_width(lines: Sequence[Sequence[Cell]], gap: int) -> int:
    """Terminal columns for the names and every figure unfolded."""
    return NAME_WIDTH + sum(gap + width for width in _widths(lines))


def _fixed_widths(names: Sequence[str], lines: Sequence[Sequence[Cell]], width: int) -> list[int | None]:
    """Widths that fold names, never figures; given the choice, rich folds figures or cuts off columns."""
    room = NAME_WIDTH + width - _needed_width(lines, gap=1)
    if room < NAME_WIDTH:
        return [None] * (1 + len(lines[0]))
    first = min(room, max(map(len, names)))
    return [first, *(least + (room - first) // len(lines[0]) for least in _widths(lines))]


def write_table(rows: Sequence[Row], folder: Path) -> None:
    """Write table.json, table.md and table.csv; nothing is written when protocols differ."""
    check_protocols(rows)
    write_json(folder / "table.json", list(rows))
    write_text(folder / "table.md", markdown(rows))
    write_text(folder / "table.csv", to_csv(rows))


def read_table(path: Path) -> list[Row]:
    """Read a table.json; UserError says in one line what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such table") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if fault := _table_fault(value):
        raise UserError(f"{path}: not a table of figures: {fault}")
    return cast(list[Row], value)


def _table_fault(value: object) -> str | None:
    if not isinstance(value, list):
        return "it must be a list of rows"
    return next((f"row {i}: {fault}" for i, row in enumerate(value) if (fault := _row_fault(row))), None)


def _row_fault(row: object) -> str | None:
    if not isinstance(row, Mapping) or not isinstance(row.get("model"), str):
        return 'no "model"'
    if not isinstance(row.get("metrics"), Mapping):
        return f'{row["model"]!r} has no "metrics"'
    faults = ((name, _figure_fault(figure)) for name, figure in row["metrics"].items())
    return next((f"{row['model']!r}, metric {name!r}: {fault}" for name, fault in faults if fault), None)


def _figure_fault(figure: Any) -> str | None:
    if not isinstance(figure, Mapping):
        return "it must be an object"
    kinds: dict[str, Any] = {
        "mean": (int, float, type(None)),
        "spread": (int, float, type(None)),
        "n": int,
        "seeds": list,
    }
    for key, kind in {**kinds, "protocol": dict}.items():
        if key not in figure or not isinstance(figure[key], kind):
            return f'"{key}" is missing or of the wrong kind'
    return None
