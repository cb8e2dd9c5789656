"""Activation differences: a row a model; along channels, along space, and how they vary at every place (Fig. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.picture import Picture
from deme_diffusion.report.figures import COLOURS, INK, SEQUENTIAL, colour_bar

Array = npt.NDArray[np.float64]
RELATIVE = 2
"""Of the kinds of variation: the change by the base's own activations."""
MOST_STEPS = 64
"""Values that are drawn one by one."""
MOST_TILES = 32
"""Along each side of a map."""
MOST_NAMES = 16
"""Places that are all named on the axis."""
FAR = 3.0
"""What is so many times another is far more."""
NOTHING = "\N{EN DASH}"


def pictures(data: Sequence[FigureData]) -> list[Picture]:
    """One picture: left and in the middle the place that changes most, right all places."""
    (figure,) = data
    _check(figure)
    models, k = figure.meta["models"], _place(figure)
    return [
        Picture(
            name="activations",
            title="What finetuning changes in the activations: along channels, and along space",
            caption=_caption(figure, k),
            alt=f"For {len(models)} models: the relative change of every channel and position at "
            f"{figure.meta['places'][k]}, sorted and as a map, and its variation at {len(figure.meta['places'])} places"
            f". {_verdict(figure)}",
            draw=lambda canvas: _draw(canvas, figure, k),
            height=1.25 + len(models) * float(np.clip(8.0 / len(models), 0.7, 1.15)),
        )
    ]


def _check(figure: FigureData) -> None:
    figure.require(("models", "places", "medians", "protocol"))
    lengths = {"m": len(figure.meta["models"]), "k": len(figure.meta["places"])}
    figure.require((), lengths, sizes="mk", variations="mk32")
    for k in range(lengths["k"]):
        for name in ("", "base_"):
            figure.require((), lengths, **{f"{name}channels_{k}": "mc", f"{name}positions_{k}": "mp+"})


def _place(figure: FigureData) -> int:
    """The place that changes most: by the median over models of the change's size."""
    return int(np.argmax(np.median(figure.arrays["sizes"], axis=0)))


# -- words ----------------------------------------------------------------------------------------


def _caption(figure: FigureData, k: int) -> str:
    """What was found, with its numbers; then what is drawn, and on what."""
    meta, on = figure.meta, figure.meta["protocol"]
    change, base = (
        f"{_span(meta, f'{kind} channels')} along channels, {_span(meta, f'{kind} positions')} along space"
        for kind in ("change", "base")
    )
    draws = "1 timestep" if on["draws"] == 1 else f"{on['draws']} timesteps"
    return (
        f"{_verdict(figure)} Mean |ΔF| is {_span(meta, 'size')} of mean |F|, and varies by {change}; |F| by {base}. "
        "ΔF: a block's output in a model less the pretrained one's, F. Coefficients of variation, cleared of "
        f"chance: medians over {len(meta['places'])} blocks, least to greatest over models. Left (not cleared) and "
        f"middle: {meta['places'][k]}; right: all, 0 where none is found. {on['num_images']} images of the "
        f"{on['split']} split, {draws} of each range, seed {on['seed']}."
    )


def _verdict(figure: FigureData) -> str:
    """What Fig. 2 argues, measured: where the change, relative to the base's own activations, varies."""
    found = [_values(figure.meta, f"relative {axis}") for axis in ("channels", "positions")]
    if not all(found):
        return "No variation along both axes can be told."
    channels, positions = (float(np.median(values)) for values in found)
    by = [_span(figure.meta, f"relative {axis}") for axis in ("channels", "positions")]
    return (
        f"Relative to |F|, the change {_differs(channels, positions)} along space: by {by[0]} from channel to channel, "
        f"{by[1]} from position to position."
    )


def _differs(channels: float, positions: float) -> str:
    """How variation along channels and along space compare; one that is not above 0 was not found."""
    if channels <= 0 or positions <= 0:
        both = f"{'differs' if channels > 0 else 'is not found to differ'} along channels"
        if (channels > 0) == (positions > 0):
            return f"{both}, nor"
        return f"{both}, {'and is not found to differ' if channels > 0 else 'but differs'}"
    if channels > FAR * positions:
        return "differs far more along channels than"
    return "differs along channels and" if positions <= FAR * channels else "differs far less along channels than"


def _values(meta: Mapping[str, Any], name: str) -> list[float]:
    return [one[name] for one in meta["medians"] if one[name] is not None]


def _span(meta: Mapping[str, Any], name: str) -> str:
    """The least and the greatest over models, in percent; of what was estimated not above 0, no number."""
    values = _values(meta, name)
    if not values:
        return NOTHING
    if max(values) <= 0 and name != "size":
        return "an amount not distinguishable from 0"
    low, high = (f"{100 * value:.2g}" if value < 1 else f"{100 * value:.0f}" for value in (min(values), max(values)))
    if min(values) <= 0 and name != "size":
        return f"at most {high} %"
    return f"{low} %" if low == high else f"{low} to {high} %"


# -- the drawing ----------------------------------------------------------------------------------


def _draw(canvas: Any, figure: FigureData, k: int) -> None:
    models = figure.meta["models"]
    channels, positions = (_relative(figure, axis, k) for axis in ("channels", "positions"))
    top = 1.05 * float(max(channels.max(), positions.max(), 1e-9))
    axes = canvas.subplots(len(models), 3, squeeze=False, sharex="col", width_ratios=(1.5, 0.75, 1.6))
    for i, (name, row) in enumerate(zip(models, axes, strict=True)):
        colour = _colour(name, i)
        _profiles(row[0], channels[i], positions[i].ravel(), colour)
        row[0].set_title(name, loc="left", fontsize=8, pad=3)
        row[0].set_ylim(0, top)
        image = row[1].imshow(_square(positions[i]), cmap=SEQUENTIAL, vmin=0, vmax=top, interpolation="none")
        row[1].set_axis_off()
        _places(row[2], figure, i, colour)
    axes[0, 1].set_title(figure.meta["places"][k], fontsize=8, pad=3)
    axes[0, 2].set_title("coefficient of variation (%)", loc="left", fontsize=8, pad=3)
    axes[-1, 0].set_xlabel("channels, or positions, sorted (%)", fontsize=8)
    for row in axes[:, 0]:
        row.set_ylabel("|ΔF| / |F| (%)", fontsize=7)
    shrink = min(1.0, 3 / len(axes))
    colour_bar(canvas, image, list(axes[:, 1]), "|ΔF| / |F| (%)", fraction=0.1, pad=0.08, shrink=shrink, aspect=22)
    _legend(canvas)


def _profiles(axes: Any, channels: Array, positions: Array, colour: str) -> None:
    """The mean change of each channel, and of each position, from the greatest to the least."""
    axes.fill_between(*_sorted(channels), color=colour, alpha=0.75, linewidth=0)
    axes.plot(*_sorted(positions), "--", color=INK, linewidth=1.0)
    axes.set_xlim(0, 100)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelsize=7)


def _sorted(values: Array) -> tuple[Array, Array]:
    """Corners of the steps from the greatest value to the least, over 0 to 100 %; of many values a curve."""
    falling, steps = np.sort(values)[::-1], np.linspace(0, 100, len(values) + 1)
    if len(values) > MOST_STEPS:
        at = np.linspace(0, 100, MOST_STEPS)
        return at, np.interp(at, (steps[1:] + steps[:-1]) / 2, falling)
    return np.repeat(steps, 2)[1:-1], np.repeat(falling, 2)


def _places(axes: Any, figure: FigureData, i: int, colour: str) -> None:
    varied, names = 100 * np.maximum(figure.arrays["variations"][i, :, RELATIVE], 0.0), figure.meta["places"]
    highest = 100 * np.nanmax(np.append(figure.arrays["variations"][:, :, RELATIVE], 0.01))
    at = np.arange(len(names))
    axes.plot(at, varied[:, 0], "o-", color=colour, markersize=3.5, linewidth=1.1)
    axes.plot(at, varied[:, 1], "s--", color=INK, markersize=3, markerfacecolor="none", linewidth=0.9)
    for nothing in at[np.isnan(varied).all(1)]:
        axes.text(nothing, 0.06 * highest, NOTHING, ha="center")
    shown = at[:: -(-len(names) // MOST_NAMES)]
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(names) <= 6 else {"rotation": 90}
    axes.set_xticks(shown, [names[j] for j in shown], fontsize=7, **slanted)
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(-0.04 * highest, 1.12 * highest))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)


def _legend(canvas: Any) -> None:
    from matplotlib.lines import Line2D

    along = [
        Line2D([], [], color="#888888", marker="o", markersize=3.5, linewidth=4, alpha=0.75, label="along channels"),
        Line2D([], [], color=INK, marker="s", markersize=3, markerfacecolor="none", dashes=(3, 1), label="along space"),
    ]
    canvas.legend(handles=along, loc="outside upper left", ncols=2, fontsize=8)


def _relative(figure: FigureData, axis: str, k: int) -> Array:
    """(models, ...): the mean change of each channel or position by the same of the base, in percent."""
    change, base = (figure.arrays[f"{name}{axis}_{k}"].astype(np.float64) for name in ("", "base_"))
    return 100 * np.divide(change, base, out=np.zeros_like(change), where=base > 0)


def _square(positions: Array) -> Array:
    """(h, w), of large ones the means of tiles; tokens (n,) row by row as a square, or as one line where it is none."""
    if positions.ndim == 1:
        side = isqrt(len(positions))
        positions = positions.reshape(side, side) if side * side == len(positions) else positions[None]
    for axis, length in enumerate(positions.shape):
        tiles = np.array_split(np.arange(length), min(length, MOST_TILES))
        sums = np.add.reduceat(positions, [tile[0] for tile in tiles], axis)
        positions = sums / np.expand_dims([len(tile) for tile in tiles], 1 - axis)
    return positions


def _colour(name: str, i: int) -> str:
    return "#8a8a8a" if name == "merged" else COLOURS[i % len(COLOURS)]
