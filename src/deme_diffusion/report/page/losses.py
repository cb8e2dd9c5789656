"""The loss on each timestep range as the difference to the base's: a picture and a small table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deme_diffusion.report.album import Album
from deme_diffusion.report.cells import Figure, Row, cells, difference_said
from deme_diffusion.report.words import MOST_NAMED, bounded

PREFIX = "loss "
MOST_DRAWN = 7  # models in the picture: as many as there are colours
Change = tuple[float, float | None]
"""Difference to the base and standard deviation over seeds (None for one seed), both in % of the base's loss."""
Changes = dict[str, dict[str, Change]]


def losses_section(rows: Sequence[Row], album: Album) -> dict[str, Any] | None:
    """What the section shows; None without a base, or where nothing was measured by ranges."""
    base = next((by_range(row) for row in rows if row["model"] == "base"), {})
    found = ((row["model"], changes_of(by_range(row), base)) for row in rows if row["model"] != "base")
    changes: Changes = {model: change for model, change in found if change}
    if not changes:
        return None
    several = any(spread is not None for change in changes.values() for _, spread in change.values())
    drawn = dict(list(changes.items())[:MOST_DRAWN])
    return {
        "image": album.svg(losses_picture(list(base), drawn)),
        "alt": f"Loss by timestep range as the difference to the base's: {_told(drawn)}",
        "models": [("", "base"), *(("ours" if model == "merged" else "", f"{model}, Δ %") for model in changes)],
        "lines": _lines([row for row in rows if row["model"] == "base"], list(base), changes),
        "metrics": {f"{PREFIX}{name}" for name in base},
        "spread": several,
        "said": _how(base, several),
    }


def by_range(row: Row) -> dict[str, Figure]:
    """A model's losses by timestep range."""
    named = {name.removeprefix(PREFIX): f for name, f in row["metrics"].items() if name.startswith(PREFIX)}
    return {name: figure for name, figure in named.items() if figure["mean"] is not None}


def changes_of(losses: Mapping[str, Figure], base: Mapping[str, Figure]) -> dict[str, Change]:
    """Each range's difference to the base, whose loss is one number for all seeds."""
    found: dict[str, Change] = {}
    for name, figure in losses.items():
        if name in base and (zero := base[name]["mean"]) and (mean := figure["mean"]) is not None:
            spread = figure["spread"]
            found[name] = (100 * (mean - zero) / zero, None if spread is None else 100 * spread / zero)
    return found


def losses_picture(names: Sequence[str], changes: Mapping[str, Mapping[str, Change]]) -> bytes:
    """A column a range, a mark a model with its standard deviation; the base is the line at 0."""
    from deme_diffusion.report.figures import COLOURS, INK, named_places, svg_of

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for k, (model, change) in enumerate(changes.items()):
            places = [names.index(name) + 0.6 * ((k + 0.5) / len(changes) - 0.5) for name in change]
            spreads = [spread or 0.0 for _, spread in change.values()]
            style = {"color": COLOURS[k], "label": model, "markersize": 5, "capsize": 2, "elinewidth": 1.2}
            axes.errorbar(places, [value for value, _ in change.values()], spreads, fmt="osD^vP*"[k], **style)
        axes.axhline(0, color=INK, linewidth=0.7)
        for edge in range(1, len(names)):
            axes.axvline(edge - 0.5, color=INK, alpha=0.12, linewidth=0.6)
        named_places(axes, names)
        axes.set(xlabel="timestep range", ylabel="loss, difference to base (%)", xlim=(-0.5, len(names) - 0.5))
        axes.margins(y=0.12)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 4), fontsize=8)

    return svg_of(draw, 5.6, 3.1)


def _lines(base: Sequence[Row], names: Sequence[str], changes: Changes) -> list[dict[str, Any]]:
    lines = []
    for name in names:
        own = cells(base, [f"{PREFIX}{name}"])[f"{PREFIX}{name}"][0].text
        said = [("", False, own, "")]
        for model, change in changes.items():
            value, _, spread = difference_said(*change[name]).partition(" ± ") if name in change else ("", "", "")
            said.append(("ours" if model == "merged" else "", False, value, spread))
        lines.append({"metric": name, "cells": said, "rule": False, "arrow": ""})
    return lines


def _told(changes: Mapping[str, Mapping[str, Change]]) -> str:
    order = sorted(changes, key=lambda model: model != "merged")  # where not all can be told
    return bounded(f"{model} {_each(changes[model])}" for model in order)


def _each(change: Mapping[str, Change]) -> str:
    """Every range, of many the first, the last, and the extremes."""
    names, by_value = list(change), sorted(change, key=lambda name: change[name][0])
    few = len(names) <= MOST_NAMED
    kept = names if few else [names[0], names[-1], by_value[0], by_value[-1]]
    told = ", ".join(f"{difference_said(*change[name])} % on {name}" for name in names if name in kept)
    return told if few else f"{told} (first, last and extremes of {len(names)} ranges)"


def _how(base: Mapping[str, Figure], several: bool) -> str:
    protocol = next(iter(base.values()))["protocol"]
    where = f" of the {protocol['split']} split" if protocol.get("split") else ""
    spread = "differences ± standard deviation over seeds" if several else "one training seed, so no spread is known"
    return (
        f"The denoising loss on fixed noise and the same images{where} for every model: the base's loss, and what the"
        f" others differ from it in % ({spread})."
    )
