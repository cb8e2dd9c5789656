"""Gradient similarity: a heatmap over bins of timesteps and the histogram over pairs (Fig. 1a)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.picture import Picture
from deme_diffusion.report.figures import COLOURS, DIVERGING, INK, colour_bar

Array = NDArray[np.float64]
BLUE, RED = COLOURS[0], COLOURS[1]
"""Pairs that conflict, and that do not: as the ends of the heatmap's colours."""
PIXELS, FEWER_PIXELS = 160, 80
"""A side of the heatmap of [0, T), and of a range's, at most: more bins are drawn as means, to keep an SVG small."""
STEPS = 100
"""Steps of the line below the histogram, at most."""
ERRORS, FEW, FARTHEST = 2.0, 10.0, 1000.0
"""Standard errors from which a bin is determined, up to which their axis is linear, and at which it ends."""
LISTED = 4
"""Ranges that the caption tells one by one."""
TOP, ROW = 3.3, 2.75
"""Inches that [0, T) and a row of ranges are high."""


@dataclass(frozen=True)
class Part:
    """The similarities within one subset of the timesteps."""

    meta: Mapping[str, Any]
    cosine: Array
    edges: Array
    beyond: Array
    """(K,) the expected gradients' squared norms over their standard errors."""

    @property
    def name(self) -> str:
        return str(self.meta["name"])

    @property
    def bins(self) -> int:
        return len(self.cosine)

    @property
    def pairs(self) -> Array:
        """Cosines of the K (K - 1) / 2 pairs."""
        return np.asarray(self.cosine[np.triu_indices(self.bins, 1)])

    @property
    def share(self) -> str:
        return _percent(self.meta["conflicting"])

    @property
    def determined(self) -> int:
        """Bins whose expected gradient is told from noise."""
        return int(self.meta["determined"])

    @property
    def axis(self) -> str:
        return "timestep t" if self.meta["edges"] == "timestep" else "position in the subset"


def pictures(data: Sequence[FigureData]) -> list[Picture]:
    """One picture: [0, T) at large, its ranges small. Raises UserError where the data lack something."""
    parts = [_part(one) for one in data]
    first, ranges = parts[0], parts[1:]
    limit = _limit(parts)
    columns = _columns(len(ranges))
    rows = math.ceil(len(ranges) / columns)

    def draw(figure: Any) -> None:
        heights = [TOP] + [ROW] * rows
        blocks = figure.subfigures(1 + rows, 1, height_ratios=heights, hspace=0.04, squeeze=False)[:, 0]
        for block in blocks:
            block.set_facecolor("none")
        _large(blocks[0], first, limit)
        for row, block in enumerate(blocks[1:]):
            _small(block, ranges[row * columns : (row + 1) * columns], columns, limit)

    alt = f"Heatmap and histogram of cosines between gradients. In {first.name}: {_seen(first)}"
    alt += "".join(f" Within {part.name}: {_seen(part)}" for part in ranges)
    title = "Do timesteps agree? Similarity of gradients on the same images and noise"
    return [Picture("similarity", title, _caption(first, ranges), alt, draw, 7.0, TOP + ROW * rows)]


def _part(data: FigureData) -> Part:
    shares = ("conflicting", "conflicting_least", "conflicting_most", "mean", "error", "determined")
    protocol = ("name", "edges", "split", "num_images", "groups", "parameters", "sketch")
    bins = len(data.arrays.get("cosine", ()))
    data.require([*protocol, *shares], {"e": bins + 1}, cosine="kk", cross="kk", cross_error="k", edges="e")
    cosine, edges, cross, error = (
        np.asarray(data.arrays[name], float) for name in ("cosine", "edges", "cross", "cross_error")
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # without noise, or a gradient, there is no error
        beyond = np.diagonal(cross) / error
    return Part(data.meta, cosine, edges, np.nan_to_num(beyond, nan=0.0, posinf=FARTHEST, neginf=-FARTHEST))


def _limit(parts: Sequence[Part]) -> float:
    """Where the shared colours end: the largest cosine of a pair, in tenths."""
    largest = max((float(np.abs(part.pairs).max()) for part in parts if part.bins > 1), default=1.0)
    return min(1.0, math.ceil(largest * 10 + 1e-9) / 10)


def _columns(ranges: int) -> int:
    """Of small pictures: three or four, whichever leaves less of the last row empty."""
    return 3 if -ranges % 3 < -ranges % 4 or ranges < 3 else 4


# -- drawing --------------------------------------------------------------------------------------


def _large(block: Any, part: Part, limit: float) -> None:
    grid = block.add_gridspec(2, 2, width_ratios=[1.25, 1.0], height_ratios=[1.7, 1.0])
    axes = block.add_subplot(grid[:, 0])
    image = _heatmap(axes, part, limit, PIXELS)
    axes.set(xlabel=part.axis, ylabel=part.axis, title=f"{part.name}: {part.bins} bins")
    extend = "neither" if limit >= 1 else "max"
    bar = colour_bar(block, image, axes, "cosine of two gradients", extend=extend)
    bar.set_ticks([-limit, -limit / 2, 0, limit / 2, limit])
    axes = block.add_subplot(grid[0, 1])
    _histogram(axes, part)
    axes.set(xlabel="cosine of two gradients", ylabel="% of pairs")
    axes.set_title(f"{part.share} of pairs conflict\non these {part.meta['num_images']} images and their noise")
    _determined(block.add_subplot(grid[1, 1]), part)


def _small(block: Any, parts: Sequence[Part], columns: int, limit: float) -> None:
    grid = block.add_gridspec(2, columns, height_ratios=[2.3, 1.0])
    for column, part in enumerate(parts):
        axes = block.add_subplot(grid[0, column])
        _heatmap(axes, part, limit, FEWER_PIXELS)
        axes.set_title(f"{_wrapped(part.name)}\n{part.share} conflict", fontsize=8)
        axes.tick_params(labelsize=7)
        if part.axis != "timestep t":
            axes.set_xlabel(part.axis, fontsize=7)
        axes = block.add_subplot(grid[1, column])
        _histogram(axes, part)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("cosine", fontsize=7)
        if not column:
            axes.set_ylabel("% of pairs", fontsize=7)


def _heatmap(axes: Any, part: Part, limit: float, pixels: int) -> Any:
    lo, hi = float(part.edges[0]), float(part.edges[-1])
    image = axes.imshow(
        thinned(part.cosine, pixels),
        cmap=DIVERGING,
        vmin=-limit,
        vmax=limit,
        extent=(lo, hi, lo, hi),
        origin="lower",
        interpolation="none",
    )
    ticks = [lo, (lo + hi) / 2, hi] if (hi - lo) % 2 == 0 else [lo, hi]
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(length=2.5)
    return image


def _histogram(axes: Any, part: Part) -> None:
    if part.bins < 2:
        axes.text(0.5, 0.5, "one bin: no pairs", transform=axes.transAxes, ha="center", fontsize=8)
        axes.set(xlim=(-1, 1), xticks=[-1, 0, 1], yticks=[])
        return
    edges = np.linspace(-1.0, 1.0, 41)
    shares = np.histogram(part.pairs, edges)[0] * 100.0 / len(part.pairs)
    colours = [BLUE if left < -1e-9 else RED for left in edges[:-1]]
    axes.bar(edges[:-1], shares, np.diff(edges), align="edge", color=colours, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlim=(-1, 1), xticks=[-1, 0, 1])
    axes.margins(y=0.12)
    axes.yaxis.get_major_locator().set_params(nbins=3)


def _determined(axes: Any, part: Part) -> None:
    """How far a bin's expected gradient is from 0, in standard errors: where it is near, images and noise decide."""
    starts = np.arange(steps := min(part.bins, STEPS)) * part.bins // steps
    means = np.add.reduceat(part.beyond, starts) / np.diff(np.append(starts, part.bins))
    edges = np.append(part.edges[starts], part.edges[-1])
    low, high = min(-3.0, 1.2 * float(means.min())), max(5.0, 1.2 * float(means.max()))
    axes.stairs(means, edges, color=COLOURS[2], linewidth=1.3, baseline=None)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axhline(ERRORS, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    if max(high, -low) > FEW:
        axes.set_yscale("symlog", linthresh=2 * ERRORS)
    ticks = [-100, 0, ERRORS, 10, 100, FARTHEST] if max(high, -low) > FEW else [-ERRORS, 0, ERRORS, 4]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set(ylim=(low, high), xlim=(part.edges[0], part.edges[-1]), xlabel=part.axis, ylabel="std. errors")
    axes.set_title(f"{part.determined} of {part.bins} bins told from noise (above {ERRORS:g})", fontsize=8)


def thinned(matrix: Array, most: int) -> Array:
    """A (K, K) matrix as the means of at most `most` x `most` blocks."""
    if len(matrix) <= most:
        return matrix
    starts = np.arange(most) * len(matrix) // most
    sizes = np.diff(np.append(starts, len(matrix)))
    sums = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    return np.asarray(sums / np.outer(sizes, sizes))


# -- words ----------------------------------------------------------------------------------------


def _caption(first: Part, ranges: Sequence[Part]) -> str:
    """The finding, a newline, and how it was made."""
    meta = first.meta
    told = f"On these {meta['num_images']} images and their noise, gradients of {first.share} of the pairs of bins of "
    told += f"{first.name} conflict (blue){_inside(ranges)}. {_expected(first, ranges)}"
    made = f"The pretrained model's gradients of the denoising loss, on {meta['split']} images; sharing them biases "
    made += f"cosines upwards. Products of {meta['groups']} groups of images are unbiased: above {ERRORS:g} standard "
    made += f"errors a bin stands out. {_error(first)}"
    thin = [part for part, most in [(first, PIXELS), *((p, FEWER_PIXELS) for p in ranges)] if part.bins > most]
    if thin:
        made += " Heatmaps of more bins than pixels show means."
    return f"{told}\n{made}"


def _inside(ranges: Sequence[Part]) -> str:
    if len(ranges) > LISTED:
        least, most = (choose(part.meta["conflicting"] for part in ranges) for choose in (min, max))
        return f"; within its {len(ranges)} parts {_percent(least)} to {_percent(most)}"
    return f"; within {_listed([f'{part.name} {part.share}' for part in ranges])}" if ranges else ""


def _expected(first: Part, ranges: Sequence[Part]) -> str:
    """What holds beyond these images and their noise."""
    told = f"{first.determined} of {first.bins} bins"
    if ranges:
        told += f" ({sum(part.determined for part in ranges)} of {sum(part.bins for part in ranges)} within)"
    if "expected" not in first.meta:
        return f"Whether expected gradients do is not determined: {told} stand out from noise."
    least, most = (_percent(first.meta[f"expected_{end}"]) for end in ("least", "most"))
    bounds = "" if least == most else f" ({least} to {most})"
    return (
        f"Of expected gradients {_percent(first.meta['expected'])}{bounds} do, by the {told} that stand out from noise."
    )


def _error(part: Part) -> str:
    meta = part.meta
    if not meta["error"]:
        return "No projection."
    least, most = _percent(meta["conflicting_least"]), _percent(meta["conflicting_most"])
    bounds = f"{part.share} stays" if least == most else f"{part.share} may be {least} to {most}"
    return f"Projected from {meta['parameters']:,} to {meta['sketch']:,} dimensions: {bounds}, at two errors."


def _seen(part: Part) -> str:
    if part.bins < 2:
        return "one bin, no pairs."
    low, high = float(part.pairs.min()), float(part.pairs.max())
    told = f"{part.share} of pairs conflict; cosines from {low:.2f} to {high:.2f}, mean {part.meta['mean']:.2f}"
    return f"{told}; {part.determined} of {part.bins} bins told from noise."


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _wrapped(name: str, width: int = 22) -> str:
    """A long name of several runs in two lines."""
    head, plus, rest = name.partition("+")
    return name if len(name) <= width or not plus else f"{head}+\n{rest}"
