"""Box plots of task-vector entries by layer, a panel a range, and relative norms by block (Fig. 6b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, cycle
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, NullLocator

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.picture import Picture
from deme_diffusion.report.figures import COLOURS, DASHES, INK

Array = npt.NDArray[np.float64]
MOST_BOXES = 60
"""Layers that get a box each, and a name; more are bands, and only their blocks are named."""
UNEVEN = 12.0
"""The widest whiskers by the median ones above which the axis is symmetric-logarithmic."""
MOST_TOLD = 6
"""Experts up to which each one's norm is told."""
MARKERS = "osD^vP*X"


def pictures(data: Sequence[FigureData]) -> list[Picture]:
    """`vectors`, the entries by layer, and `vectors-norms`, the norms by block."""
    (figure,) = data
    figure.require(("names", "layers", "blocks", "of_block", "sampled", "folded", "whole"))
    lengths = {"n": len(figure.meta["names"]), "l": len(figure.meta["layers"]), "b": len(figure.meta["blocks"])}
    figure.require((), lengths, quantiles="nl7", mean_absolute="nl", relative_norms="nb")
    names, layers, blocks = (figure.meta[name] for name in ("names", "layers", "blocks"))
    named = 1.5 if len(layers) <= MOST_BOXES else 0.9
    return [
        Picture(
            name="vectors",
            title="Entries of the task vectors, layer by layer",
            caption=_entries_caption(figure),
            alt=f"{len(names)} panels, one for each expert, with the spread of its task vector's entries in "
            f"{len(layers)} layers from input to output. {_norms(figure)}",
            draw=lambda canvas: _draw_entries(canvas, figure),
            height=named + len(names) * float(np.clip(6.0 / len(names), 0.6, 1.25)),
        ),
        Picture(
            name="vectors-norms",
            title="Relative norms of the task vectors, block by block",
            caption=_norms_caption(figure),
            alt=f"For {len(names)} experts and {len(blocks)} blocks: the task vector's norm by that of the pretrained "
            f"weights. {_norms(figure)}",
            draw=lambda canvas: _draw_norms(canvas, figure),
            height=3.2 + 0.2 * (len(names) // 3),
        ),
    ]


# -- words ----------------------------------------------------------------------------------------


def _entries_caption(figure: FigureData) -> str:
    """What was found, with its numbers; then what is drawn."""
    meta, sampled, typical = figure.meta, len(figure.meta["sampled"]), _typical(figure)
    boxes = "Boxes: 25 to 75 %, with the median; whiskers: 5 to 95 %"
    what = boxes if _boxed(figure) else "Dark bands: 25 to 75 %; pale ones: 5 to 95 %"
    scale = "; the axis is linear around 0 and logarithmic beyond" if _uneven(figure) else ""
    seen = f" Of {sampled} layers of more than 4 million entries, {meta['sample']:,} sampled ones." if sampled else ""
    told = ", ".join(f"{value:.2g}" for value in typical)
    most = f", most for {meta['names'][int(np.argmax(typical))]}" if len(typical) > 1 and max(typical) > 0 else ""
    count, layers = int(_changed(figure).sum()), len(meta["layers"])
    some = f" {count} of {layers} layers are changed by some expert; the median is over these."
    adapted = some * (0 < count < layers)
    return (
        f"In the median layer mean |τ_i| is {told}, expert by expert{most}.{adapted} τ_i is expert i's weights less "
        f"the pretrained ones{_folded(meta)}. A panel for each expert, {len(meta['layers'])} layers (weight and bias "
        f"together) in the order of the forward pass. {what} of a layer's entries{scale}.{seen}"
    )


def _folded(meta: Mapping[str, Any]) -> str:
    """What the numbers hold beside finetuned weights, which tables of the parts count apart."""
    return ", with the projections that fold into them" if meta["folded"] else ""


def _norms_caption(figure: FigureData) -> str:
    """What was found, with its numbers; then what is drawn."""
    whole, blocks = figure.meta["whole"], figure.meta["blocks"]
    pairs = [whole["cosines"][i][j] for i, j in combinations(range(len(figure.meta["names"])), 2)]
    cosines = [cosine for cosine in pairs if cosine is not None]
    between = (
        f" Cosines between task vectors: {min(cosines):.3g} to {max(cosines):.3g}, mean {np.mean(cosines):.3g}."
        if cosines else ""
    )  # fmt: skip
    extra = " Projections that fold into no weight have no norm to compare with, and are left out." * (
        "projection" in blocks
    )
    counted = " Projections that fold into weights are counted in." * bool(figure.meta["folded"])
    share = whole["share_seen"]
    seen = f" From {100 * share:.2g} % of the entries, in evenly spread runs." if share < 0.999 else ""
    return f"{_norms(figure)}{between} By block of layers, in the order of the forward pass.{counted}{extra}{seen}"


def _norms(figure: FigureData) -> str:
    """The paper's finding (larger for large t), as numbers; of many experts the least and the greatest."""
    names, norms = figure.meta["names"], figure.meta["whole"]["relative_norms"]
    known = sorted((norm, name) for norm, name in zip(norms, names, strict=True) if norm is not None)
    if len(names) > MOST_TOLD and known:
        (least, first), (most, last) = known[0], known[-1]
        return f"Over the model, ‖τ_i‖ / ‖θ‖ is from {_percent(least)} ({first}) to {_percent(most)} ({last})."
    told = [f"{_percent(norm)} for {name}" for name, norm in zip(names, norms, strict=True)]
    top = f"; the largest is that of {known[-1][1]}" if len(known) > 1 and known[-1][0] > 0 else ""
    return f"Over the model, ‖τ_i‖ / ‖θ‖ is {', '.join(told)}{top}."


def _percent(share: float | None) -> str:
    return "unknown" if share is None else "0" if share == 0 else f"{100 * share:.3g} %"


def _typical(figure: FigureData) -> list[float]:
    changed = _changed(figure)
    return [float(np.median(row[changed])) if changed.any() else 0.0 for row in figure.arrays["mean_absolute"]]


def _changed(figure: FigureData) -> npt.NDArray[np.bool_]:
    """(layers,) Which ones some expert changes: LoRAs leave most alone."""
    return np.asarray((figure.arrays["mean_absolute"] != 0).any(0))


# -- entries by layer -----------------------------------------------------------------------------


def _draw_entries(canvas: Any, figure: FigureData) -> None:
    names, quantiles = figure.meta["names"], figure.arrays["quantiles"]
    axes = canvas.subplots(len(names), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    power = _power(figure)
    for i, (name, panel) in enumerate(zip(names, axes, strict=True)):
        (_boxes if _boxed(figure) else _bands)(panel, quantiles[i] / 10.0**power, COLOURS[i % len(COLOURS)])
        _blocks(panel, figure.meta)
        panel.set_title(name, loc="left", fontsize=8, pad=3 if i or not _boxed(figure) else 12)
        panel.axhline(0, color=INK, linewidth=0.5, alpha=0.6)
        panel.tick_params(labelsize=7)
        panel.tick_params(axis="x", length=0)
    _scale(axes[0], figure, power)
    unit = f" (10$^{{{power}}}$)" if power else ""
    axes[len(axes) // 2].set_ylabel(f"entries of τ{unit}", parse_math=True)
    axes[0].set_xlim(-0.8, len(figure.meta["layers"]) - 0.2)
    (_name_layers if _boxed(figure) else _name_blocks)(axes, figure.meta)


def _boxes(axes: Any, quantiles: Array, colour: str) -> None:
    """All boxes as one path, all whiskers and all medians as one line each: an SVG of many layers stays small."""
    _, low, lower, median, upper, high, _ = quantiles.T
    at, gap = np.arange(len(quantiles)), np.full(len(quantiles), np.nan)
    left, right = at - 0.35, at + 0.35
    corners = np.stack([left, lower, right, lower, right, upper, left, upper], 1).reshape(-1, 4, 2)
    axes.add_patch(PathPatch(Path.make_compound_path_from_polys(corners), facecolor=colour, linewidth=0))
    axes.plot(np.stack([at, at, gap], 1).ravel(), np.stack([low, high, gap], 1).ravel(), color=colour, linewidth=0.9)
    level = np.stack([median, median, gap], 1).ravel()
    axes.plot(np.stack([left, right, gap], 1).ravel(), level, color="white", linewidth=0.9)


def _bands(axes: Any, quantiles: Array, colour: str) -> None:
    _, low, lower, _, upper, high, _ = quantiles.T
    at = np.arange(len(quantiles))
    for bottom, top, alpha in ((low, high, 0.35), (lower, upper, 0.9)):
        axes.fill_between(at, bottom, top, color=colour, alpha=alpha, linewidth=0)


def _blocks(axes: Any, meta: Mapping[str, Any]) -> None:
    """Every other block on a pale ground."""
    for number, (first, last) in enumerate(_spans(meta)):
        if number % 2:
            axes.axvspan(first - 0.5, last + 0.5, color=INK, alpha=0.07, linewidth=0, zorder=0)


def _name_layers(axes: Sequence[Any], meta: Mapping[str, Any]) -> None:
    blocks = [meta["blocks"][k] for k in meta["of_block"]]
    layers = [layer.removeprefix(f"{block}.") for layer, block in zip(meta["layers"], blocks, strict=True)]
    axes[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    axes[-1].tick_params(axis="x", length=1.5, pad=1)
    for block, (first, last) in zip(meta["blocks"], _spans(meta), strict=True):
        text = _short(block)
        if 6.2 * (last - first + 1) / len(layers) > 0.06 * len(text):
            where = {"xy": ((first + last) / 2, 1.0), "xycoords": ("data", "axes fraction")}
            axes[0].annotate(text, **where, xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)


def _name_blocks(axes: Sequence[Any], meta: Mapping[str, Any]) -> None:
    """Larger blocks first, and those that find room beside them."""
    spans, apart = list(_spans(meta)), 0.022 * len(meta["layers"])
    taken: dict[float, str] = {}
    for block, (first, last) in sorted(zip(meta["blocks"], spans, strict=True), key=lambda one: one[1][0] - one[1][1]):
        middle = (first + last) / 2
        if all(abs(middle - other) >= apart for other in taken):
            taken[middle] = block
    axes[-1].set_xticks(list(taken), list(taken.values()), rotation=90, fontsize=6.5)


def _spans(meta: Mapping[str, Any]) -> list[tuple[int, int]]:
    """First and last layer of each block."""
    of = np.array(meta["of_block"])
    return [
        (int(found[0]), int(found[-1])) for k in range(len(meta["blocks"])) if len(found := np.flatnonzero(of == k))
    ]


def _short(block: str) -> str:
    return block.replace("_blocks.", " ").removesuffix("_block")


def _scale(axes: Any, figure: FigureData, power: int) -> None:
    reach = _reach(figure) / 10.0**power
    most = 1.08 * float(reach.max()) or 1.0
    if _uneven(figure):
        axes.set_yscale("symlog", linthresh=float(np.median(reach)))
        ends = 10.0 ** np.floor(np.log10(most))
        axes.set_yticks([-ends, 0, ends], [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in (-ends, 0, ends)])
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(3, symmetric=True))
    axes.set_ylim(-most, most)


def _reach(figure: FigureData) -> Array:
    """(N, layers): how far the whiskers go."""
    found: Array = np.abs(figure.arrays["quantiles"][:, :, [1, 5]]).max(2)
    return found


def _uneven(figure: FigureData) -> bool:
    reach = _reach(figure)
    return bool(reach.max() > UNEVEN * np.median(reach) > 0)


def _power(figure: FigureData) -> int:
    """Of ten: the unit of the axis, so that its numbers are short."""
    most = float(_reach(figure).max())
    return int(3 * np.floor(np.log10(most) / 3)) if most > 0 else 0


def _boxed(figure: FigureData) -> bool:
    return len(figure.meta["layers"]) <= MOST_BOXES


# -- norms by block -------------------------------------------------------------------------------


def _draw_norms(canvas: Any, figure: FigureData) -> None:
    meta, norms = figure.meta, 100 * figure.arrays["relative_norms"]
    kept = np.flatnonzero(np.isfinite(norms).any(0))
    blocks, norms = [meta["blocks"][k] for k in kept], norms[:, kept]
    axes = canvas.subplots()
    whole = meta["whole"]["relative_norms"]
    styles = zip(cycle(COLOURS), cycle(MARKERS), cycle(np.repeat(DASHES, len(COLOURS))), strict=False)
    for name, row, over, (colour, marker, dash) in zip(meta["names"], norms, whole, styles, strict=False):
        label = f"{name}: {_percent(over)}"
        axes.plot(range(len(blocks)), row, dash, color=colour, marker=marker, markersize=4, linewidth=1.0, label=label)
    positive = norms[norms > 0]
    if len(positive) == norms.size and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * float(norms.max(initial=0.0)) or 1.0)
    shown = range(0, len(blocks), -(-len(blocks) // 40))
    slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(blocks) <= 14 else {"rotation": 90}
    axes.set_xticks(shown, [blocks[k] for k in shown], fontsize=7, **slanted)
    axes.set(ylabel="‖τ‖ / ‖θ‖ of a block (%)", xlim=(-0.4, len(blocks) - 0.6))
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    wide = len(meta["names"]) > 4 and max(map(len, meta["names"])) < 24
    canvas.legend(loc="outside upper left", ncols=3 if wide else 2, fontsize=8)
