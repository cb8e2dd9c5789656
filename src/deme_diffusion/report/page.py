"""The page of a run: one self-contained HTML file, no scripts, nothing fetched, every text escaped."""

import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from deme_diffusion.division import names_of
from deme_diffusion.files import write_text
from deme_diffusion.report.ablation_page import ablation_section
from deme_diffusion.report.card import DEMONSTRATION, loading_lines, method_said, needs, patterns
from deme_diffusion.report.cells import (
    REAL_IMAGES,
    Row,
    cells,
    decimals_for,
    direction,
    protocol_lines,
    protocol_text,
    reason_lines,
)
from deme_diffusion.report.figures import curves, division_picture, division_tables, sample_grid, weights_bars
from deme_diffusion.report.tables import check_protocols
from deme_diffusion.report.verdict import verdict

BEST_TRIALS = 10
"""Trials of a search that the page shows; the others are folded."""
GRID_WIDTH, GRID_COLUMNS, GRID_IMAGES = 400, 8, 64  # a grid's pixels across, and how many images it shows
FIRST = ("base", "merged")  # so that they are in sight where the table has to be scrolled
# What the template takes as it is.
PRINTED = ("description", "command", "recipe_yaml", "stages", "provenance", "lost_gains")
BADGES = {True: "helps", False: "no gain shown", None: "not conclusive"}


def write_page(run_folder: Path, run: Mapping[str, Any]) -> Path:
    """Write report.html into the run folder, atomically; grids are read relative to that folder."""
    path = run_folder / "report.html"
    write_text(path, render_page(run, run_folder))
    return path


def render_page(run: Mapping[str, Any], folder: Path = Path()) -> str:
    """The page as text; `run` is run.json, a section whose key is missing is left out."""
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["pieces"] = _pieces
    rows: list[Row] = run.get("table") or []
    check_protocols(rows)
    return environment.get_template("page.html").render(
        run={**dict.fromkeys(PRINTED), **run},
        title=str(run.get("title") or run.get("recipe", "run")),
        demonstration=DEMONSTRATION if run.get("demonstration") else "",
        verdict=_verdict(rows),
        table=_table(rows),
        grids=_grids(run, folder),
        curves=_curves(run),
        weights=_weights(run),
        search=_search(run),
        merge={"said": method_said(run), "patterns": patterns(run)},
        vectors=_vectors(run),
        division=_division(run),
        ablations=[ablation_section(content) for content in run.get("ablations") or ()],
        svg=_svg,
        provenance=list(_provenance(run.get("provenance") or {})),
        loading=loading_lines(run) if run.get("merged_path") else "",
        needs=needs(run),
        seconds=_seconds,
    )


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as the address of an image, e.g. kind `image/png`."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _svg(data: bytes) -> str:
    return data_uri(data, "image/svg+xml")


def _pieces(text: str) -> list[str]:
    """Text split where a line may break: after dots, commas, equals signs and underscores, not inside words."""
    return re.split(r"(?<=[.,=_])(?=[^\s\d])", text)


def _provenance(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What made the run: a name and a value each; what could not be found out is left out."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield name, ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
        elif value is not None:
            yield name, str(value)


def _verdict(rows: list[Row]) -> dict[str, Any] | None:
    if not rows:
        return None
    result = verdict(rows)
    kind = {True: "yes", False: "no", None: "open"}[result.helps]
    return {"sentence": result.sentence, "badge": BADGES[result.helps], "kind": kind}


def _table(rows: list[Row]) -> dict[str, Any] | None:
    """Models across (base and merged first), metrics down; a rule above each group that shares one protocol."""
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: FIRST.index(row["model"]) if row["model"] in FIRST else len(FIRST))
    kinds = [{"merged": "ours", REAL_IMAGES: "real"}.get(row["model"], "") for row in rows]
    lines, protocol = [], ""
    for metric, line in cells(rows).items():
        before, protocol = protocol, protocol_text(rows, metric)
        arrow = {"lower": "↓", "higher": "↑", None: ""}[direction(metric)]
        parts = [(kind, cell.best, *cell.text.partition(" ± ")[::2]) for kind, cell in zip(kinds, line, strict=True)]
        lines.append({"metric": metric, "cells": parts, "rule": protocol != before, "arrow": arrow})
    models = list(zip(kinds, (row["model"] for row in rows), strict=True))
    return {"models": models, "lines": lines, "notes": protocol_lines(rows) + reason_lines(rows)}


def _grids(run: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    return [_grid(label, folder / path) for label, path in (run.get("grids") or {}).items()]


def _grid(label: str, path: Path) -> dict[str, Any]:
    """A grid as an image, or the reason why there is none; pickles are never loaded."""
    try:
        images: NDArray[np.uint8] = np.load(path, allow_pickle=False)[:GRID_IMAGES]
        scale = max(1, GRID_WIDTH // (GRID_COLUMNS * (images.shape[2] + 1)))
        src = data_uri(sample_grid(images, GRID_COLUMNS, scale), "image/png")
    except (OSError, ValueError, EOFError, IndexError) as error:
        return {"label": label, "src": "", "note": f"{path.name}: {error}"}
    return {"label": label, "src": src, "note": f"{len(images)} {'images' if label == REAL_IMAGES else 'samples'}"}


def _curves(run: Mapping[str, Any]) -> list[dict[str, str]]:
    plots = ((name, series) for name, series in (run.get("curves") or {}).items() if series)
    return [{"name": name, "lines": ", ".join(series), "src": _svg(curves(series, name))} for name, series in plots]


def _names(run: Mapping[str, Any], count: int) -> list[str]:
    """The subsets by their ranges where the division is known, else w_0, w_1 ..."""
    names = names_of((run.get("division") or {}).get("subsets", []))
    return names if len(names) == count else [f"w_{i}" for i in range(count)]


def _weights(run: Mapping[str, Any]) -> dict[str, Any] | None:
    weights: Mapping[str, list[float]] = run.get("weights") or {}
    if not weights:
        return None
    names = _names(run, max(map(len, weights.values())))
    return {"names": names, "values": weights, "src": _svg(weights_bars(weights, names))}


def _search(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The search's trials, the best first (lowest, unless the objective is known to be better when higher)."""
    search = run.get("search")
    if not search or not search.get("trials"):
        return None
    trials = search["trials"]
    sign = -1 if direction(search["objective"]) == "higher" else 1
    worth = [math.inf if trial["value"] is None else sign * trial["value"] for trial in trials]
    order = sorted(range(len(trials)), key=lambda i: worth[i])  # of equals the first was chosen
    names = _names(run, max(len(trial["weights"]) for trial in trials))
    decimals = 1 + decimals_for(trial["value"] for trial in trials if trial["value"] is not None)
    rows = [{**trials[i], "said": _said(trials[i]["value"], decimals)} for i in order]
    return {**search, "names": names, "shown": rows[:BEST_TRIALS], "folded": rows[BEST_TRIALS:]}


def _said(value: float | None, decimals: int) -> str:
    """A trial's value; weights of which none comes are unusable."""
    return "unusable" if value is None else f"{value:.{decimals}f}"


def _vectors(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The task vectors by layer group, from merge.json: relative norms in %, means over pairs of cosine and overlap."""
    seen = (run.get("merge") or {}).get("statistics")
    if not seen:
        return None
    rows = []
    for group, one in {**seen["groups"], "all of the model": seen["model"]}.items():
        norms = ["-" if norm is None else f"{100 * norm:.3g}" for norm in one["relative_norms"]]
        alike = (_off_diagonal(one["cosines"]), _off_diagonal(one["overlaps"]))
        label = "projections (their θ is 0)" if group == "projection" else group
        rows.append((label, f"{one['parameters']:,}", norms, *alike))
    return {"names": _names(run, len(seen["model"]["norms"])), "rows": rows}


def _off_diagonal(matrix: Sequence[Sequence[float | None]]) -> str:
    """The mean over pairs; those of a task vector that is 0 have no value."""
    pairs = [value for i, row in enumerate(matrix) for value in row[:i] if value is not None]
    return f"{sum(pairs) / len(pairs):.3f}" if pairs else "-"


def _division(run: Mapping[str, Any]) -> dict[str, Any] | None:
    division = run.get("division")
    if not division:
        return None
    picture, total = division_picture(*division_tables(division)), division["num_train_timesteps"]
    return {"src": _svg(picture), "names": names_of(division["subsets"]), "total": total}


def _seconds(value: float) -> str:
    """Seconds for people: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if value < 100:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
