"""The page that shows several runs side by side: one file, no scripts, nothing fetched, every text escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deme_diffusion.config import FIGURES
from deme_diffusion.report.album import MOST_BYTES, Album
from deme_diffusion.report.card import DEMONSTRATION, method_said
from deme_diffusion.report.cells import Figure, difference_said, direction, figure_decimals, number, plain
from deme_diffusion.report.compare import comparison
from deme_diffusion.report.compare_losses import losses_section
from deme_diffusion.report.page.drawn import analyze_command, figures_told
from deme_diffusion.report.page.environment import environment
from deme_diffusion.report.page.merging import weights_section
from deme_diffusion.report.page.pictures import HEADINGS, grids_section
from deme_diffusion.report.page.results import BADGES, COLOURED

NONE = "\N{EN DASH}"
LONGEST = 200  # characters of a setting that is shown
SHOWN = 60  # of a protocol's value in a note
Run = Mapping[str, Any]


def render_comparison(runs: Sequence[Run], most_bytes: int = MOST_BYTES) -> str:
    """The page as text; `runs` are the contents of the runs' own pages, each with its `folder`."""
    album, told = Album(), comparison(runs)
    labels = [run["name"] for run in told["runs"]]
    values = {
        "title": f"{len(runs)} runs side by side",
        "refresh": None,
        "labels": labels,
        "runs": [_head(run) for run in told["runs"]],
        "demonstration": DEMONSTRATION if any(run["demonstration"] for run in runs) else "",
        "settings": [{"key": s["key"], "values": [_setting(v) for v in s["values"]]} for s in told["settings"]],
        "table": _table(told, labels),
        "losses": losses_section(runs, labels, album),
        "weights": [_weights(run, album) for run in runs],
        "grids": [_grids(run, album) for run in runs],
        "figures": _figures(runs, album),
    }
    template = environment().get_template("compare.html")
    return album.fit(lambda: template.render(**values, shortened=album.shortened), most_bytes)


def _head(run: Mapping[str, Any]) -> dict[str, Any]:
    kind = COLOURED[run["helps"]]
    return {**run, "kind": kind, "badge": BADGES[run["helps"]]}


def _setting(value: Any) -> str:
    text = NONE if value is None else plain(value) if value != [] else "none"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


# -- the table ------------------------------------------------------------------------------------


def _table(told: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """Metrics down; for each run base, outcome and difference across. Unlike protocols have a mark and a note."""
    notes: dict[str, str] = {}
    lines = []
    for one in told["metrics"]:
        why = _why(one["unlike"], labels)
        mark = notes.setdefault(why, chr(ord("a") + len(notes) % 26) * (1 + len(notes) // 26)) if why else ""
        arrow = {"lower": "↓", "higher": "↑", None: ""}[one["better"]]
        lines.append({"metric": one["metric"], "arrow": arrow, "mark": mark, "cells": _cells(one, compared=not why)})
    said = [
        {"mark": mark, "metrics": [one["metric"] for one in lines if one["mark"] == mark], "why": why}
        for why, mark in notes.items()
    ]
    return {"outcomes": [run["outcome"] for run in told["runs"]], "lines": lines, "notes": said}


def _why(different: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> str:
    """`n: 2,000 (a), 500 (b)`, for each field of the protocol that differs."""
    parts = []
    for field, values in different.items():
        groups: dict[str, list[str]] = {}
        for label, value in zip(labels, values, strict=True):
            text = NONE if value is None else plain(value)
            groups.setdefault(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…", []).append(label)
        parts.append(f"{field}: {', '.join(f'{text} ({chr(44).join(whose)})' for text, whose in groups.items())}")
    return "; ".join(parts)


def _cells(one: Mapping[str, Any], *, compared: bool) -> list[dict[str, Any]]:
    """Texts of one line; the best outcome is marked where the runs may be compared."""
    figures = [run[name] for run in one["runs"] for name in ("base", "outcome") if run[name]]
    decimals = figure_decimals(figures)
    best = _best(one, decimals) if compared else ""
    made = []
    for run in one["runs"]:
        texts = {name: number(run[name], decimals) if run[name] else NONE for name in ("base", "outcome")}
        change = run["difference"]
        moved = change is not None and change["mean"] is not None
        texts["difference"] = difference_said(change["mean"], change["margin"]) if moved else NONE
        parts = {name: text.partition(" ± ")[::2] for name, text in texts.items()}
        made.append({**parts, "best": best != "" and parts["outcome"][0] == best})
    return made


def _best(one: Mapping[str, Any], decimals: int) -> str:
    """The best outcome as it is printed; '' where no direction is known, or all print the same."""
    outcomes: list[Figure] = [run["outcome"] for run in one["runs"] if run["outcome"]]
    known = [figure for figure in outcomes if figure["mean"] is not None]
    texts = {number(figure, decimals).partition(" ± ")[0]: figure["mean"] for figure in known}
    better = direction(one["metric"])
    if better is None or len(texts) < 2:
        return ""
    return (min if better == "lower" else max)(texts, key=lambda text: texts[text] or 0.0)


# -- pictures -------------------------------------------------------------------------------------


def _weights(run: Run, album: Album) -> dict[str, Any] | None:
    """The weights of the merged model as bars; None where nothing is merged."""
    merged = (run.get("weights") or {}).get("merged")
    if merged is None:
        return None
    section = weights_section({**run, "weights": {"merged": merged}}, album)
    assert section is not None
    values = ", ".join(f"{name} {w:.3g}" for name, w in zip(section["names"], merged, strict=True))
    search = run.get("search")
    how = f"{search['method'].replace('_', ' ')}, {len(search['trials'])} trials" if search else "given, not searched"
    return {"image": section["image"], "values": values, "how": how, "said": method_said(run)}


def _grids(run: Run, album: Album) -> list[dict[str, Any]]:
    """The samples of base and outcome."""
    shown = {name: path for name, path in run["grids"].items() if name in ("base", run["outcome"])}
    return grids_section({"grids": shown}, Path(run["folder"]), album)


def _figures(runs: Sequence[Run], album: Album) -> list[dict[str, Any]]:
    """A row a kind that any run has: its pictures in each run, or how they are made there."""
    rows = []
    told = [figures_told(run["figures"], Path(run["folder"]), album)[0] for run in runs]
    for kind in FIGURES:
        shown = [[one for one in pictures if one["kind"] == kind] for pictures in told]
        if any(shown):
            commands = [analyze_command(Path(run["folder"]), [kind]) for run in runs]
            rows.append({"title": HEADINGS[kind], "runs": list(zip(shown, commands, strict=True))})
    return rows
