"""Pictures of a run as PNG or SVG bytes; arrays and records in, no pyplot and no lasting global state.

The SVGs draw text and axes in the reader's own ink (`currentColor`), dark on light and light on dark.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from deme_diffusion.errors import UserError

INK = "#010203"  # stands for the page's text colour; no other mark uses it
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1")  # Okabe and Ito, and a violet
DASHES = ("-", "--", ":", "-.")
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"  # matplotlib's names; both are told apart by the colour-blind
MAX_POINTS = 300
MOST_BANDS = 30  # runs of one subset that are told apart as bands
MOST_NAMED, MOST_TICKS = 14, 25  # lines that a legend names, and subsets that an axis does
HIGHEST = 7.0  # inches of all bands of a division
STYLE = {
    "svg.hashsalt": "deme",  # the same figure has the same bytes
    "text.parse_math": False,  # a name with dollars is a name
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
INK_RULES = b"<style>svg{color:#22262b}@media (prefers-color-scheme:dark){svg{color:#d5d9de}}</style>"

Points = Sequence[Sequence[float]]


def sample_grid(images: NDArray[np.uint8], columns: int, scale: int, gap: int = 1) -> bytes:
    """(n, h, w, c) uint8 images, c = 1 or 3, row by row as a PNG; every pixel becomes scale x scale pixels."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3) or not len(images):
        raise UserError(f"a grid needs uint8 images (n, h, w, 1 or 3), got {images.dtype} {images.shape}")
    n, h, w, _ = images.shape
    columns, gap = min(columns, n), gap * scale
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    high, wide = h * scale + gap, w * scale + gap
    canvas = np.full((math.ceil(n / columns) * high - gap, columns * wide - gap, 3), 128, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * high, i % columns * wide
        canvas[top : top + h * scale, left : left + w * scale] = tile
    return png(canvas)


def reduced(images: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """(n, h, w, c) uint8 images made so many pixels wide, in their proportions."""
    high, channels = max(1, round(width * images.shape[1] / images.shape[2])), images.shape[3]
    small = [Image.fromarray(one.squeeze()).resize((width, high), Image.Resampling.LANCZOS) for one in images]
    return np.stack([np.array(one).reshape(high, width, channels) for one in small])


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An (h, w, 3) array as PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", optimize=True)
    return out.getvalue()


def curves(series: Mapping[str, Points], ylabel: str, xlabel: str = "optimizer step") -> bytes:
    """Lines of (step, value) as SVG; long series are drawn as the means of at most 300 equal pieces."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for (label, points), (colour, dash) in zip(series.items(), _styles(), strict=False):
            steps, values = thinned(points)
            axes.plot(steps, values, dash, color=colour, label=label, marker="." if len(steps) < 2 else None)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        _legend(figure, axes)

    return svg_of(draw, 5.6, 3.1)


def thinned(points: Points, most: int = MAX_POINTS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values, non-finite points left out, as the means of at most `most` consecutive pieces."""
    table = np.array([p for p in points if p[1] is not None and math.isfinite(p[1])], np.float64).reshape(-1, 2)
    if len(table) > most:
        table = np.array([piece.mean(axis=0) for piece in np.array_split(table, most)])
    return table[:, 0], table[:, 1]


def division_picture(member: NDArray[np.bool_], route: NDArray[np.integer[Any]]) -> bytes:
    """(N, T) membership as one band per expert over the timesteps, and the (T,) route below, as SVG.

    Subsets of many runs are strokes on a pale band, with their size; a route that says nothing new of them is a line.
    """
    experts, steps = member.shape
    if route.shape != (steps,):
        raise UserError(f"a route over {steps} timesteps needs shape ({steps},), got {route.shape}")

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        scattered = [len(_spans(part)) > MOST_BANDS for part in member]
        alone = any(scattered) and all(np.array_equal(part, route == i) for i, part in enumerate(member))
        for i, (colour, _) in zip(range(experts), _styles(), strict=False):
            axes.broken_barh(_spans(member[i]), (i - 0.36, 0.72), color=colour, linewidth=0)
            if scattered[i]:
                axes.broken_barh([(0, steps)], (i - 0.36, 0.72), color=colour, alpha=0.16, linewidth=0)
                axes.text(steps * 1.01, i, f"{member[i].sum():,}", va="center", fontsize=8)
            if not alone:
                axes.broken_barh(_spans(route == i), (experts + 0.1, 0.72), color=colour, linewidth=0)
        if alone:
            axes.text(0, experts + 0.46, "each timestep by the expert that trains on it", va="center", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        named = range(0, experts, math.ceil(experts / MOST_TICKS))
        axes.set_yticks([*named, experts + 0.46], [*(f"expert {i}" for i in named), "route"])
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="timestep t", xlim=(0, steps), ylim=(experts + 1, -0.6))
        axes.spines["left"].set_visible(False)

    return svg_of(draw, 5.6, 0.9 + min(0.27 * (experts + 1), HIGHEST))


def division_tables(division: Mapping[str, Any]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(N, T) membership and the (T,) route, from a division's plain values."""
    total = division["num_train_timesteps"]
    member, route = np.zeros((len(division["subsets"]), total), np.bool_), np.full(total, -1)
    for row, runs in zip(member, division["subsets"], strict=True):
        for lo, hi in runs:
            row[lo:hi] = True
    for lo, hi, index in division["route"]:
        route[lo:hi] = index
    return member, route


def weights_bars(weights: Mapping[str, Sequence[float]], subset_names: Sequence[str]) -> bytes:
    """Merge weights w_i as bars: a group per subset, a colour per merged model, as SVG."""
    for label, values in weights.items():
        if len(values) != len(subset_names):
            raise UserError(f"{label!r} has {len(values)} merge weights for {len(subset_names)} subsets")

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        width = 0.8 / max(1, len(weights))
        places = np.arange(len(subset_names))
        for k, ((label, values), (colour, _)) in enumerate(zip(weights.items(), _styles(), strict=False)):
            bars = axes.bar(places + (k + 0.5) * width - 0.4, values, width * 0.94, color=colour, label=label)
            if len(subset_names) * len(weights) <= 16:
                axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axes.axhline(0, color=INK, linewidth=0.7)
        named_places(axes, subset_names)
        axes.set(xlabel="subset of the timesteps", ylabel="merge weight w")
        axes.margins(y=0.12)
        _legend(figure, axes)

    return svg_of(draw, 5.6, 3.0)


def named_places(axes: Any, names: Sequence[str]) -> None:
    """Names at 0, 1, ... of the x-axis; of many only every second, third ..."""
    kept = range(0, len(names), max(1, math.ceil(len(names) / MOST_TICKS)))
    axes.set_xticks(list(kept), [names[i] for i in kept], rotation=0 if len(names) <= 6 else 60)


def png_of(draw: Callable[[Any], None], width: float, height: float) -> bytes:
    """A drawing as PNG, for where no SVG is shown: dark on white, 200 dots per inch."""
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(out, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def colour_bar(figure: Any, image: Any, axes: Any, label: str, **options: Any) -> Any:
    """A bar in the reader's ink for what `image` shows on `axes` (one, or several that share it), named."""
    bar = figure.colorbar(image, ax=axes, label=label, **{"fraction": 0.05, "pad": 0.02, **options})
    bar.outline.set_visible(False)
    bar.ax.tick_params(width=0.7, length=2.5, labelsize=8)
    if bar.solids is not None:  # as it is for the lines of contours
        bar.solids.set(rasterized=True, edgecolor="face")  # else an SVG shows 256 strips with gaps between them
    return bar


def _styles() -> Iterator[tuple[str, str]]:
    """Colours in turn, then the same colours dashed, without end."""
    return ((colour, dash) for dash in cycle(DASHES) for colour in COLOURS)


def _spans(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Runs of True as (start, length), for broken_barh."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(start), int(stop - start)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1 or (labels and labels[0]):
        if len(handles) > MOST_NAMED:
            more = f"and {len(handles) - MOST_NAMED + 1} more"
            handles, labels = handles[:MOST_NAMED], [*labels[: MOST_NAMED - 1], more]
        longest = max(map(len, labels))
        columns = max(1, min(len(handles), 80 // (longest + 6)))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8, handlelength=1.6)


def svg_of(draw: Callable[[Any], None], width: float, height: float) -> bytes:
    """Draw on a fresh figure of width x height inches; matplotlib's settings are as before afterwards."""
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inked(out.getvalue())


def svg_and_png_of(draw: Callable[[Any], None], width: float, height: float) -> tuple[bytes, bytes]:
    """`svg_of` and `png_of` at once: drawn and laid out only once, which is what takes the time."""
    svg, png = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")
        figure.savefig(png, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return _inked(svg.getvalue()), png.getvalue()


def _inked(svg: bytes) -> bytes:
    """An SVG whose ink is the reader's."""
    head, tag, rest = svg.replace(INK.encode(), b"currentColor").partition(b"<defs>")
    return head + INK_RULES + tag + rest
