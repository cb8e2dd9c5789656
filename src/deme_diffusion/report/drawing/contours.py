"""Maps of a loss relative to the base's: levels that several panels share, filled contours and their lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.patheffects import withStroke

Array = npt.NDArray[np.float64]
STEPS = ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))
"""Mantissas of the levels, fewer where they would be many."""
MOST_LEVELS = 16
WORTH_SEEING = 0.005
"""What a map must go below 0, relative to its height, for levels to show it."""
PIXELS, LINES = 32, 6
"""From one cell to the next: pixels of the colours, and points of the lines."""
LONGEST_NAME = 24
MISSING, MINUS = "#9a9a9a", "\u2212"
BELOW = LinearSegmentedColormap.from_list("below", ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0"])
ABOVE = LinearSegmentedColormap.from_list("above", ["#fdf3e7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"])


def percent(loss: Array, base: float | None) -> Array:
    """A loss as what it is above the base's, in per cent of it; NaN everywhere where the base has none."""
    return np.full_like(loss, np.nan) if not base else 100 * (loss / base - 1)


def levels(maps: Sequence[Array]) -> Array:
    """Levels in per cent, 0 among them, in steps of about a factor, up to the highest and down to the lowest value.

    The first is a tenth of the flattest map's height, or half of what the first map goes below 0, if that is less.
    """
    finite = [one[np.isfinite(one)] for one in maps]
    heights = [float(np.abs(one).max(initial=0)) for one in finite]
    if not any(heights):
        return np.array([-1.0, 0.0, 1.0])
    depth = -float(finite[0].min(initial=0))
    least = min(height for height in heights if height) / 10
    if depth > heights[0] * WORTH_SEEING:
        least = min(least, depth / 2)
    top, bottom = max(float(one.max(initial=0)) for one in finite), -min(float(one.min(initial=0)) for one in finite)
    steps = iter(STEPS)
    mantissas = next(steps)
    while len(found := _both(least, bottom, top, mantissas)) > MOST_LEVELS + 1:
        fewer = next(steps, None)
        mantissas, least = (fewer, least) if fewer else (mantissas, 10 * least)
    return np.array(found)


def _both(least: float, bottom: float, top: float, mantissas: tuple[float, ...]) -> list[float]:
    """Levels from -bottom to top, 0 among them."""
    below, above = (_ladder(least, end, mantissas) for end in (bottom, top))
    return [*(-value for value in reversed(below)), 0.0, *above]


def _ladder(least: float, top: float, mantissas: tuple[float, ...]) -> list[float]:
    """Levels from the one at or below `least` to the first at or above `top`; none where `top` is not above least."""
    if top <= least:
        return []
    powers = range(int(np.floor(np.log10(least))), int(np.ceil(np.log10(top))) + 1)
    every = [float(f"{m}e{power}") for power in powers for m in mantissas]
    first = max(k for k, value in enumerate(every) if value <= least * (1 + 1e-9))
    last = next(k for k, value in enumerate(every) if value >= top * (1 - 1e-9))
    return every[first : last + 1]


def colours(at: Array) -> tuple[ListedColormap, BoundaryNorm]:
    """One colour between two levels: blue below the base, cream to red above it."""
    below, above = int((at < 0).sum()), int((at > 0).sum())
    most = max(below, above, 8) - 1
    shades = [*(BELOW(1 - k / most) for k in reversed(range(below))), *(ABOVE(k / most) for k in range(above))]
    return ListedColormap(shades), BoundaryNorm(at, len(at) - 1)


def relief(axes: Any, x: Array, y: Array, height: Array, at: Array) -> Any:
    """Draw `height` (P, Q) over x (P,) and y (Q,): bands of colour and lines between; grey where there is no number.

    Returns: what a colour bar is made of.
    """
    colormap, norm = colours(at)
    axes.set_facecolor(MISSING)
    across, up, image = smooth(x, y, height, PIXELS)
    half = (across[1] - across[0]) / 2, (up[1] - up[0]) / 2
    extent = (across[0] - half[0], across[-1] + half[0], up[0] - half[1], up[-1] + half[1])
    bands = axes.imshow(
        np.ma.masked_invalid(image.T), cmap=colormap, norm=norm, extent=extent, origin="lower", interpolation="none"
    )  # fmt: skip
    across, up, fine = smooth(x, y, height, LINES)
    between = [level for level in at if np.nanmin(fine, initial=np.inf) < level < np.nanmax(fine, initial=-np.inf)]
    if between:
        widths = [1.1 if level == 0 else 0.5 for level in between]
        axes.contour(across, up, fine.T, between, colors="#222222", linewidths=widths, linestyles="-", alpha=0.6)
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    axes.tick_params(labelsize=7)
    return bands


def smooth(x: Array, y: Array, height: Array, times: int) -> tuple[Array, Array, Array]:
    """A map `times` as fine through the same cells, cubic in the logarithm of the loss; as it is where some miss."""
    if min(height.shape) < 4 or not np.isfinite(height).all() or (height <= -100).any():
        return x, y, height
    from scipy.interpolate import RectBivariateSpline

    fine_x, fine_y = (np.interp(np.arange((len(v) - 1) * times + 1) / times, np.arange(len(v)), v) for v in (x, y))
    spline = RectBivariateSpline(x, y, np.log1p(height / 100), kx=3, ky=3)
    return fine_x, fine_y, 100 * np.expm1(np.asarray(spline(fine_x, fine_y)))


def bar(figure: Any, filled: Any, axes: Any, at: Array) -> None:
    """The colour bar of maps of `at`."""
    held = figure.colorbar(filled, ax=axes, ticks=at, spacing="uniform", shrink=0.95, aspect=30, pad=0.02)
    held.ax.set_yticklabels([signed(value) for value in at])
    held.ax.tick_params(labelsize=7, length=2)
    held.set_label("loss above the base's", fontsize=8)


def signed(value: float) -> str:
    """A level or a change in per cent, for people: +0.05%, 0, +2,000%."""
    return "0" if value == 0 else f"{value:+,.6g}%".replace("-", MINUS)


def rounded(change: float | None) -> str:
    """A relative change in per cent, to two digits."""
    return "not finite" if change is None else signed(float(f"{100 * change:.2g}"))


def plus_minus(told: Mapping[str, float | None]) -> str:
    """A relative `change` with its standard `error`, both in per cent, to the error's second digit."""
    change, error = told["change"], told["error"]
    if change is None or not error:
        return rounded(change)
    digits = int(np.clip(1 - np.floor(np.log10(100 * error)), 0, 9))
    return f"{100 * change:+,.{digits}f} ± {100 * error:.{digits}f}%".replace("-", MINUS)


def within_noise(told: Mapping[str, float | None]) -> bool:
    """Whether a change is less than two standard errors from 0."""
    return told["change"] is not None and abs(told["change"]) < 2 * (told["error"] or 0.0)


def is_gain(told: Mapping[str, float | None]) -> bool:
    """Whether a loss is below the base's by two standard errors or more."""
    return told["change"] is not None and told["change"] < 0 and not within_noise(told)


def compared(told: Mapping[str, float | None]) -> str:
    """`plus_minus`, and whether that is within noise."""
    return f"{plus_minus(told)}{' (within noise)' if within_noise(told) else ''}"


def tested(least: Mapping[str, Any], cells: int) -> str:
    """The least loss of a grid in a sentence: it is picked, so it is judged by images that it was not picked on."""
    if least["change"] is None:
        return "The base's loss is not finite."
    if not least["change"]:
        return f"None of the {cells:,} models drawn is better than the base."
    verdict = "" if is_gain(least["tested"]) else ", within noise" if within_noise(least["tested"]) else ", no gain"
    return (
        f"The least of the {cells:,} models drawn, {rounded(least['change'])}, is picked; tested on other images: "
        f"{plus_minus(least['tested'])}{verdict}."
    )


def loss_name(protocol: Mapping[str, Any]) -> str:
    """What the loss on this split is called."""
    return "Training loss" if protocol["split"] == "train" else "Denoising loss on held-out images"


def marked(
    axes: Any, x: float, y: float, marker: str, colour: str, label: str, *, size: float = 7, hollow: bool = False
) -> None:
    """One model on a map, with an edge that makes it stand out of every colour."""
    cross = marker == "X"  # white, so its stroke is black, and thin, so that it stays hollow
    stroke = withStroke(linewidth=2.4 if cross else 3.4, foreground="black" if cross else "white")
    edge = "white" if colour.startswith("#0") or marker == "o" else "black"
    axes.plot(
        [x], [y], marker, color="none" if hollow else colour, markersize=size, linestyle="none", label=label, zorder=5,
        markeredgecolor=colour if hollow else edge, markeredgewidth=(1.0 if cross else 2) if hollow else 0.9,
        clip_on=False, path_effects=[stroke] if hollow else None,
    )  # fmt: skip


def brief(name: str, index: int | None) -> str:
    """An expert's name for a legend; its number alone where its subset is long to tell."""
    return name if index is None or len(name) <= LONGEST_NAME else f"expert {index}"
