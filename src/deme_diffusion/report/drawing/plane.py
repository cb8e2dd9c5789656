"""The loss on the plane of two task vectors, with the models that lie there (Fig. 6a)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.contours import MINUS, bar, brief, levels, marked, percent, relief, signed
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
    i, j = figure.meta["pair"]
    if figure.arrays["x"].size > 1 and figure.arrays["y"].size > 1:
        title = f"Training loss on the plane of the task vectors of expert {i} and expert {j}"
        return [Picture("plane", title, _caption(figure), _alt(figure), lambda canvas: _map(canvas, figure), 7.0, 4.1)]
    k = i if figure.arrays["x"].size > 1 or i == j else j
    title = f"Training loss along the task vector of expert {k}"
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
        fontsize=8,
        handletextpad=0.6,
        labelspacing=0.7,
        title="(x, y): loss above the base's",
        title_fontsize=8,
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
        told = _told("optimum of the grid", best["x"], best["y"], best["loss"], figure)
        marked(axes, best["x"], best["y"], "X", "#FFFFFF", told, size=8)
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
    return _told(name, mark["x"], mark["y"], mark["losses"][0], figure)


def _told(name: str, x: float, y: float, loss: float | None, figure: FigureData) -> str:
    return f"{name}\n{_at(x, y)}: {_change(loss, figure)}"


def _at(x: float, y: float) -> str:
    return f"({x:.2f}, {y:.2f})".replace("-0.00", "0.00").replace("-", MINUS)


def _change(loss: float | None, figure: FigureData) -> str:
    base = _base(figure)
    return "not finite" if loss is None or not base else signed(float(f"{100 * (loss / base - 1):.2g}"))


def _caption(figure: FigureData) -> str:
    meta = figure.meta
    i, j = meta["pair"]
    two = min(figure.arrays[name].size for name in "xy") > 1
    cells = " x ".join(str(figure.arrays[name].size) for name in "xy" if figure.arrays[name].size > 1) or "1"
    where = (
        f"base + x u + y v, u the task vector of expert {i} (length {meta['lengths'][0]:.3g}) and v the part of expert "
        f"{j}'s that is orthogonal to it (length {meta['lengths'][1]:.3g}; cosine of the two {meta['cosine']:.2f})"
    )
    line = f"base + c times the task vector{'' if i == j else ', since two span no plane here'}"
    parts = [f"Loss over all timesteps at {where if two else line}: {cells} models, on {noise_of(meta['protocol'])}."]
    parts += [_of_marks(figure)]
    best = meta["optimum"]
    if best:
        at = _at(best["x"], best["y"])
        parts.append(f"Optimum of the grid: {best['loss']:.5g} ({_change(best['loss'], figure)}) at {at}.")
    else:
        parts.append("No model of the grid has a finite loss.")
    return " ".join(parts)


def _of_marks(figure: FigureData) -> str:
    """Where models stand, their losses, and how far from the plane they are."""
    base, *others = _named(figure)
    told = [f"{mark['name']} {_number(mark['losses'][0])} ({_change(mark['losses'][0], figure)})" for mark in others]
    text = f"Losses of the models themselves: pretrained {_number(base['losses'][0])}, {', '.join(told)}."
    if unnamed := [mark for mark in figure.meta["marks"] if mark not in _named(figure)]:
        losses = [mark["losses"][0] for mark in unnamed if mark["losses"][0] is not None] or [None]
        text += f" {len(unnamed)} other experts: {_number(min(losses))} to {_number(max(losses))}."
    off = [f"{mark['name']} {mark['distance']:.0%}" for mark in others if _off(mark)]
    if off:
        text += (
            " Off the plane, and drawn where they project to (experts as rings); distance by the length of the task "
            f"vector: {', '.join(off)}."
        )
    return text


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.5g}"


def _alt(figure: FigureData) -> str:
    best, (i, j) = figure.meta["optimum"], figure.meta["pair"]
    shape = "Contour map" if min(figure.arrays[name].size for name in "xy") > 1 else "Curve"
    where = f" Least loss at {_at(best['x'], best['y'])}, {_change(best['loss'], figure)}." if best else ""
    changes = ", ".join(f"{m['name']} {_change(m['losses'][0], figure)}" for m in _named(figure)[1:])
    return f"{shape} of the loss around the base along experts {i} and {j}.{where} Models against the base: {changes}."
