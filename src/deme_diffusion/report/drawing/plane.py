"""The loss on the plane of two task vectors, with the models that lie there (Fig. 6a)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.contours import (
    MINUS,
    bar,
    brief,
    compared,
    is_gain,
    levels,
    loss_name,
    marked,
    percent,
    plus_minus,
    relief,
    rounded,
    tested,
)
from deme_diffusion.report.drawing.landscape import noise_of
from deme_diffusion.report.drawing.picture import Picture
from deme_diffusion.report.figures import COLOURS, INK

Array = npt.NDArray[np.float64]
Mark = Mapping[str, Any]
IN_PLANE = 1e-3
"""Distance from the plane, relative to the length of a task vector, below which a model lies in it."""
MARGIN = 0.06
"""Of a map's width, around models that lie outside it."""
MOST_NAMED = 11
FAR = 2.0
"""Coefficient beyond which a model is told of, and not drawn."""


def pictures(data: Sequence[FigureData]) -> list[Picture]:
    """One picture: the map with its models; a curve where the task vectors span no plane."""
    (figure,) = data
    facts = ("experts", "pair", "lengths", "cosine", "optimum", "protocol", "marks")
    figure.require(facts, loss="rpq", overall="pq", x="p", y="q")
    i, j = figure.meta["pair"]
    loss = loss_name(figure.meta["protocol"])
    if figure.arrays["x"].size > 1 and figure.arrays["y"].size > 1:
        title = f"{loss} over the plane of the task vectors of expert {i} and expert {j}"
        return [Picture("plane", title, _caption(figure), _alt(figure), lambda canvas: _map(canvas, figure), 7.0, 3.9)]
    k = i if figure.arrays["x"].size > 1 or i == j else j
    title = f"{loss} along the task vector of expert {k}"
    return [Picture("plane", title, _caption(figure), _alt(figure), lambda canvas: _curve(canvas, figure), 7.0, 3.2)]


def _named(figure: FigureData) -> list[Mark]:
    """The models told by name: all, or where they are many the base, the two of the plane and the merged model."""
    marks: list[Mark] = figure.meta["marks"]
    if len(marks) <= MOST_NAMED:
        return marks
    return [mark for mark in marks if mark["role"] != "expert" or mark["index"] in figure.meta["pair"]]


# -- drawing --------------------------------------------------------------------------------------


def _map(canvas: Any, figure: FigureData) -> None:
    x, y = figure.arrays["x"], figure.arrays["y"]
    height = percent(figure.arrays["overall"], _base(figure))
    at = levels([height])
    i, j = figure.meta["pair"]
    axes = canvas.add_subplot()
    bands = relief(axes, x, y, height, at)
    axes.set_aspect(_aspect(figure))
    axes.set_facecolor("none" if np.isfinite(height).all() else axes.get_facecolor())
    _place(axes, figure)
    axes.set_xlabel(f"x, coefficient of τ{_low(i)}")
    axes.set_ylabel(f"y, coefficient of the part of τ{_low(j)}\northogonal to τ{_low(i)}")
    bar(canvas, bands, [axes], at)
    canvas.legend(
        loc="outside right upper",
        fontsize=7,
        handletextpad=0.4,
        labelspacing=0.7,
        title="(x, y): loss above the base's\n± standard error",
        title_fontsize=7,
    )


def _curve(canvas: Any, figure: FigureData) -> None:
    x, y = figure.arrays["x"], figure.arrays["y"]
    along, name = (x, "x") if x.size >= y.size else (y, "y")
    axes = canvas.add_subplot()
    axes.plot(along, percent(figure.arrays["overall"], _base(figure)).flatten(), color=INK, marker=".")
    axes.axhline(0, color=INK, linewidth=0.6, alpha=0.4)
    for mark in figure.meta["marks"]:
        if mark[name] is None:
            continue
        shown = percent(np.array(mark["losses"][0], np.float64), _base(figure))
        _draw_mark(axes, mark[name], float(shown), mark, figure, on_map=False)
    k = figure.meta["pair"][0 if name == "x" else 1]
    axes.set(xlabel=f"{name}, coefficient of τ{_low(k)}", ylabel="loss above the base's (%)")
    canvas.legend(loc="outside right upper", fontsize=8)


def _place(axes: Any, figure: FigureData) -> None:
    """The models where they project to; the axes grow to hold them, unless they are far outside."""
    limits = [list(axes.get_xlim()), list(axes.get_ylim())]
    margin = MARGIN * (limits[0][1] - limits[0][0])
    for mark in figure.meta["marks"]:
        if all(mark[name] is not None and -FAR < mark[name] < FAR for name in "xy"):
            for name, limit in zip("xy", limits, strict=True):
                limit[:] = [min(limit[0], mark[name] - margin), max(limit[1], mark[name] + margin)]
            _draw_mark(axes, mark["x"], mark["y"], mark, figure)
    if best := figure.meta["optimum"]:
        real, at = is_gain(best["tested"]), _at(best["x"], best["y"])
        label = f"least of the grid{'' if real else ', within noise'}\n{at}: {plus_minus(best['tested'])}"
        marked(axes, best["x"], best["y"], "X", "#FFFFFF", label, size=8 if real else 10, hollow=not real)
    axes.set(xlim=limits[0], ylim=limits[1])


def _draw_mark(axes: Any, x: float, y: float, mark: Mark, figure: FigureData, *, on_map: bool = True) -> None:
    """A dot, or off the plane a ring, which is so large that a dot or the merged model's star shows inside."""
    label = _label(mark, figure) if mark in _named(figure) else "_"
    if mark["role"] == "expert":
        colour, off = COLOURS[mark["index"] % len(COLOURS)], on_map and _off(mark)
        marked(axes, x, y, "o", colour, label, size=12 if off else 8, hollow=off)
    elif mark["role"] == "merged":
        marked(axes, x, y, "*", "#F0E442", label, size=10)
    else:
        marked(axes, x, y, "s", "#000000", label)


def _off(mark: Mark) -> bool:
    return mark["distance"] is not None and mark["distance"] > IN_PLANE


def _aspect(figure: FigureData) -> float:
    """True to lengths, where that leaves a map."""
    lengths = figure.meta["lengths"]
    return float(np.clip(lengths[1] / lengths[0], 0.6, 1.6))


# -- words ----------------------------------------------------------------------------------------


def _base(figure: FigureData) -> float | None:
    base: float | None = figure.meta["marks"][0]["losses"][0]
    return base


def _low(index: int) -> str:
    """A number as a subscript."""
    return "".join("₀₁₂₃₄₅₆₇₈₉"[int(digit)] for digit in str(index))


def _label(mark: Mark, figure: FigureData) -> str:
    name = "pretrained" if mark["role"] == "base" else brief(mark["name"], mark["index"])
    return f"{name}\n{_at(mark['x'], mark['y'])}: {plus_minus(mark)}"


def _at(x: float, y: float) -> str:
    return f"({x:.2f}, {y:.2f})".replace("-0.00", "0.00").replace("-", MINUS)


def _caption(figure: FigureData) -> str:
    """What was found, with its numbers; then what is drawn, and on what."""
    meta, best, told = figure.meta, figure.meta["optimum"], _in_caption(figure)
    changes = [f"{_name(mark)} {compared(mark)}" for mark in told]
    if others := [mark for mark in meta["marks"][1:] if mark not in told]:
        finite = [mark["change"] for mark in others if mark["change"] is not None] or [None]
        changes.append(f"{len(others)} other{'s' * (len(others) > 1)} {rounded(min(finite))} to {rounded(max(finite))}")
    parts = [f"Loss over [0,T) against the pretrained model's {_number(_base(figure))}: {', '.join(changes)}."]
    parts.append(tested(best, figure.arrays["overall"].size) if best else "No model of the grid has a finite loss.")
    parts.append(f"{_drawn(figure)}; {noise_of(meta['protocol'])}; ±: standard error.")
    if off := [f"{_name(mark)} {mark['distance']:.0%}" for mark in _named(figure) if _off(mark)]:
        parts.append(f"Off the plane, by their task vectors' lengths: {', '.join(off)}.")
    return " ".join(parts)


def _in_caption(figure: FigureData) -> list[Mark]:
    """The merged model, and the plane's two; all of three models."""
    marks: list[Mark] = figure.meta["marks"][1:]
    kept = [m for m in marks if len(marks) <= 3 or m["role"] != "expert" or m["index"] in figure.meta["pair"]]
    return sorted(kept, key=lambda mark: bool(mark["role"] == "expert"))


def _name(mark: Mark) -> str:
    return f"expert {mark['index']}" if mark["role"] == "expert" else str(mark["name"])


def _drawn(figure: FigureData) -> str:
    """What the map, or the curve, is of."""
    i, j = figure.meta["pair"]
    if min(figure.arrays[name].size for name in "xy") == 1:
        return f"Drawn: base + c times the task vector{'' if i == j else ', since two span no plane here'}"
    u, v = figure.meta["lengths"]
    return (
        f"Map: base + x u + y v, u = τ{_low(i)} (length {u:.3g}), v the part of τ{_low(j)} orthogonal to it ({v:.3g}; "
        f"cosine {figure.meta['cosine']:.2f})"
    )


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.5g}"


def _alt(figure: FigureData) -> str:
    best, (i, j) = figure.meta["optimum"], figure.meta["pair"]
    shape = "Contour map" if min(figure.arrays[name].size for name in "xy") > 1 else "Curve"
    where = f" Least loss at {_at(best['x'], best['y'])}, tested {compared(best['tested'])}." if best else ""
    changes = ", ".join(f"{mark['name']} {plus_minus(mark)}" for mark in _named(figure)[1:])
    return f"{shape} of the loss around the base along experts {i} and {j}.{where} Models against the base: {changes}."
