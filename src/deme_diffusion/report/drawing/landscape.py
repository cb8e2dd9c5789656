"""The loss landscape around the pretrained model (Fig. 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.contours import (
    bar,
    brief,
    is_gain,
    levels,
    loss_name,
    marked,
    percent,
    relief,
    rounded,
    tested,
)
from deme_diffusion.report.drawing.picture import Picture
from deme_diffusion.report.figures import COLOURS, INK

Array = npt.NDArray[np.float64]
MOST_RANGES, MOST_NAMED = 8, 10
"""Panels beside that of all timesteps; experts that a legend names."""


def pictures(data: Sequence[FigureData]) -> list[Picture]:
    """One picture: a map for all timesteps and for each range; curves, where there is one direction only."""
    (figure,) = data
    figure.require(("experts", "radius", "protocol", "directions", "told"), loss="rpq", overall="pq", a="p", b="q")
    drawings = {2: _maps, 1: _curves, 0: _nothing}
    dimensions = sum(len(figure.arrays[name]) > 1 for name in "ab")
    draw, width, height = drawings[dimensions](figure)
    title = "Loss landscape around the pretrained model"
    return [Picture("landscape", title, caption(figure, dimensions), _alt(figure), draw, width, height)]


def panels(figure: FigureData) -> list[tuple[str, Array, Mapping[str, Any]]]:
    """(name, loss in per cent above the base's, numbers) of all timesteps and of each range, evenly chosen where there
    are more than are drawn."""
    protocol, told = figure.meta["protocol"], figure.meta["told"]
    names = ["all timesteps", *protocol["ranges"]]
    losses = [figure.arrays["overall"], *figure.arrays["loss"]]
    every = [
        (name, percent(loss, row["base"]), row) for name, loss, row in zip(names, losses, told, strict=True)
    ]  # fmt: skip
    if len(every) == 2:  # one range is all timesteps
        return every[:1]
    chosen = np.unique(np.linspace(1, len(every) - 1, min(MOST_RANGES, len(every) - 1)).round().astype(int))
    return [every[0], *(every[k] for k in chosen)]


# -- two directions -------------------------------------------------------------------------------


def _maps(figure: FigureData) -> tuple[Any, float, float]:
    shown = panels(figure)
    at = levels([height for _, height, _ in shown])
    places, columns, rows = _layout(len(shown))

    def draw(canvas: Any) -> None:
        grid = canvas.add_gridspec(rows, columns)
        every = [canvas.add_subplot(grid[place]) for place in places]
        for axes, (name, height, told) in zip(every, shown, strict=True):
            filled = relief(axes, figure.arrays["a"], figure.arrays["b"], height, at)
            axes.set_title(fill(name, 18), fontsize=9 if len(name) <= 18 else 7)
            axes.set_aspect("auto")  # aligned; nearly square by the size of the whole
            _models(axes, figure, told)
        for axes, outer in zip(every, _outer(places), strict=True):
            axes.tick_params(labelbottom="bottom" in outer, labelleft="left" in outer)
        canvas.supxlabel(f"a, {_along(figure, 0)}", fontsize=9)
        canvas.supylabel(f"b, {_along(figure, 1)}", fontsize=9)
        bar(canvas, filled, every, at)
        _legend(canvas, every)

    return draw, 7.0 if columns > 1 else 4.8, 0.75 + rows * 5.3 / max(columns, 2) + _legend_height(figure)


Place = tuple[slice, slice]


def _layout(count: int) -> tuple[list[Place], int, int]:
    """Places in a grid of (columns, rows): all timesteps twice as large beside three or four ranges."""
    if count in (4, 5):
        small = [(slice(k // 2, k // 2 + 1), slice(2 + k % 2, 3 + k % 2)) for k in range(count - 1)]
        return [(slice(0, 2), slice(0, 2)), *small], 4, 2
    columns = min(count, 3)
    rows = -(-count // columns)
    return (
        [(slice(k // columns, k // columns + 1), slice(k % columns, k % columns + 1)) for k in range(count)],
        columns,
        rows,
    )


def _outer(places: Sequence[Place]) -> Iterator[set[str]]:
    """Which of a panel's sides have no panel beyond them."""
    for rows, columns in places:
        below = any(other.start == rows.stop and across.start == columns.start for other, across in places)
        beside = any(across.stop == columns.start for other, across in places if other.start <= rows.start < other.stop)
        yield {*([] if below else ["bottom"]), *([] if beside else ["left"])}


def _models(axes: Any, figure: FigureData, told: Mapping[str, Any]) -> None:
    marked(axes, 0.0, 0.0, "o", "#000000", "pretrained")
    for k, (a, b) in enumerate(figure.arrays.get("coordinates", ())):
        if max(abs(a), abs(b)) > figure.meta["radius"]:
            continue
        size = max(9 - 1.2 * k, 4)  # where two lie together the first is a ring around the second
        name = brief(figure.meta["experts"][k], k) if len(figure.meta["experts"]) <= MOST_NAMED else "_"
        marked(axes, a, b, "o", COLOURS[k % len(COLOURS)], name, size=size)
    if told["least"] and (told["least"]["a"] or told["least"]["b"]):
        real, at = is_gain(told["least"]["tested"]), (told["least"]["a"], told["least"]["b"])
        name = f"least loss of the grid{'' if real else ', within noise'}"
        marked(axes, *at, "X", "#FFFFFF", name, size=8 if real else 10, hollow=not real)


def _legend(canvas: Any, every: Sequence[Any]) -> None:
    """What the marks of all panels are, where there is more than the base."""
    found = {label: handle for axes in every for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(found) > 1:
        canvas.legend(list(found.values()), list(found), loc="outside upper left", ncols=min(len(found), 3), fontsize=8)


def _legend_height(figure: FigureData) -> float:
    experts = len(figure.arrays.get("coordinates", ()))
    return 0.16 * -(-(experts + 2) // 3) + 0.1 if experts and experts <= MOST_NAMED else 0.2


# -- one direction, and none ----------------------------------------------------------------------


def _curves(figure: FigureData) -> tuple[Any, float, float]:
    def draw(canvas: Any) -> None:
        axes = canvas.add_subplot()
        for k, (name, height, _) in enumerate(panels(figure)):
            colour = COLOURS[(k - 1) % len(COLOURS)] if k else INK
            axes.plot(figure.arrays["a"], height[:, 0], color=colour, label=name, marker=".")
        axes.axvline(0, color=INK, linewidth=0.6, alpha=0.4)
        axes.axhline(0, color=INK, linewidth=0.6, alpha=0.4)
        axes.set(xlabel=f"a, {_along(figure, 0)}", ylabel="loss above the base's (%)")
        axes.legend(fontsize=8)

    return draw, 5.6, 3.2


def _nothing(figure: FigureData) -> tuple[Any, float, float]:
    def draw(canvas: Any) -> None:
        canvas.text(0.5, 0.5, "All task vectors are 0: there is no direction to go.", ha="center", va="center")

    return draw, 5.6, 1.0


# -- words ----------------------------------------------------------------------------------------


def _along(figure: FigureData, k: int) -> str:
    if figure.meta["directions"] == "random":
        return f"random direction {k + 1} (filter norms)"
    return f"direction {k + 1} (RMS norms of τ)"


def caption(figure: FigureData, dimensions: int) -> str:
    """What was found, with its numbers; then what is drawn, and on what."""
    meta, rows = figure.meta, panels(figure)
    name, _, whole = rows[0]
    if not dimensions:
        return f"All task vectors are 0, so there is no direction to go; loss over {name}: {_number(whole['base'])}."
    cells = figure.arrays["overall"].size
    ranges = f" ({', '.join(f'{range_} {_rise(row)}' for range_, _, row in rows[1:])})" if rows[1:] else ""
    parts = [
        f"From the middle to the border the loss changes by {_rise(whole)} on average{ranges}.",
        tested(whole["least"], cells) if whole["least"] else "No model of the grid has a finite loss.",
        f"{loss_name(meta['protocol'])} at base{' + a d1 + b d2' if dimensions == 2 else ' + a d1'} against the "
        f"base's in that range (over {name} {_number(whole['base'])}), on {noise_of(meta['protocol'])}.",
        _which(meta),
    ]
    if "coordinates" in figure.arrays and dimensions == 2:
        off = int((np.abs(figure.arrays["coordinates"]).max(axis=1) > meta["radius"]).sum())
        parts.append(f"Experts stand where they project to{f'; {off} outside the map' if off else ''}.")
    return " ".join(parts)


def noise_of(protocol: Mapping[str, Any]) -> str:
    """The points that losses are taken on."""
    draws = "" if protocol["draws"] == 1 else f", {protocol['draws']} timesteps each"
    per = "each range" if len(protocol["ranges"]) > 1 else "[0,T)"
    return (
        f"{protocol['num_images']:,} images of the {protocol['split']} split in {per}{draws}, timesteps and noise alike"
    )


def _which(meta: Mapping[str, Any]) -> str:
    if meta["directions"] == "random":
        return "Directions: random, 1 being each filter's own norm (Li et al. 2018); biases and norms stay."
    shares = " and ".join(f"{share:.0%}" for share in meta["shares"])
    return (
        f"Directions: the task vectors' leading ones (PCA), {shares or 'none'} of their squared norms; 1: their root "
        f"mean square norm, {meta['unit_length']:.3g}."
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _rise(row: Mapping[str, Any]) -> str:
    return rounded(row["rise"])


def _alt(figure: FigureData) -> str:
    rows = panels(figure)
    shape = "Contour maps" if figure.arrays["b"].size > 1 else "Curves"
    told = ", ".join(f"{name} {_rise(row)}" for name, _, row in rows)
    return f"{shape} of the loss around the pretrained model. Mean change on the border: {told}."
