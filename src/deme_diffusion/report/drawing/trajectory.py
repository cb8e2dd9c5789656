"""Sample grids of the same seeds, and one image's way through the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.picture import Picture
from deme_diffusion.report.figures import COLOURS, DASHES, INK

Pixels = npt.NDArray[np.uint8]
SMALL = 32
"""Pixels a side up to which all images of a grid are shown, each of its pixels as it is."""
FEW, LARGE = 16, 64
"""Of larger images: how many of a grid, and pixels a side; so that a drawing of photographs stays below 0.6 MB."""
FOLLOWED = 48
"""Pixels a side of the images of the trajectory."""
TOLD = 8
"""Prompts that a caption tells."""
ACTS = ("ensemble",)
"""Models in which the expert of a timestep acts; in the others it only would."""


def pictures(data: Sequence[FigureData]) -> list[Picture]:
    """The picture `samples`, and the picture `trajectory`."""
    _check(data[0])
    return [_samples(data[0]), _trajectory(data[0])]


def _check(data: FigureData) -> None:
    data.require(("models", "names", "sampler", "num_steps", "size", "changed"), timesteps="s", steps="s", experts="s")
    for name in data.meta["models"]:
        ways = {f"x_t_{name}": "shwc", f"x_0_{name}": "shwc"}
        data.require((), {"s": len(data.arrays["timesteps"])}, **{f"grid_{name}": "nhwc"}, **ways)


# -- grids ----------------------------------------------------------------------------------------


def _samples(data: FigureData) -> Picture:
    models, count = data.meta["models"], len(data.arrays[f"grid_{data.meta['models'][0]}"])
    grids = [shown(data.arrays[f"grid_{name}"]) for name in models]
    columns = int(np.ceil(len(grids[0]) ** 0.5))
    rows = -(-len(grids[0]) // columns)
    width = 7.0 if len(models) > 1 else 3.5
    high, wide = grids[0].shape[1:3]
    height = 0.25 + width / len(models) * (rows * high) / (columns * wide)

    def draw(figure: Any) -> None:
        for axes, name, images in zip(figure.subplots(1, len(models), squeeze=False)[0], models, grids, strict=True):
            canvas, _ = tiled(images, columns, gap=_gap(images))
            axes.imshow(canvas, interpolation="none")
            axes.set_title(name)
            axes.set_axis_off()

    few = "" if len(grids[0]) == count else f"; the first {len(grids[0])} are shown"
    caption = (
        f"{_changed(data)}A difference is no gain: the table tells quality. {count} images of each model by "
        f"{data.meta['sampler']}{few}; the same place has the same seed{_asked(data)}, so that what differs is the "
        f"model's doing.{_reduced(data, grids[0])}"
    )
    alt = f"Grids of {len(grids[0])} sampled images side by side, one each of {_listed(models)}."
    return Picture("samples", "Samples of the same seeds", caption, alt, draw, width, height)


def shown(images: Pixels) -> Pixels:
    """Of a grid (n, h, w, c) what is drawn: small images as they are; of larger ones few, of `LARGE` pixels a side."""
    return images if max(images.shape[1:3]) <= SMALL else smaller(images[:FEW], LARGE)


def smaller(images: Pixels, side: int) -> Pixels:
    """(n, h, w, c) averaged over k x k pixels, k the least with which no side is longer; what is left over is cut."""
    n, h, w, c = images.shape
    k = -(-max(h, w) // side)
    cut = images[:, : h // k * k, : w // k * k].reshape(n, h // k, k, w // k, k, c)
    return np.asarray(cut.mean(axis=(2, 4)).round().astype(np.uint8)) if k > 1 else images


def tiled(images: Pixels, columns: int, gap: int) -> tuple[Pixels, list[tuple[int, int]]]:
    """(the images row by row on a clear ground, RGBA; left and top of each)."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    canvas = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, 4), np.uint8)
    places = [(i % columns * (w + gap), i // columns * (h + gap)) for i in range(n)]
    for (left, top), image in zip(places, images, strict=True):
        canvas[top : top + h, left : left + w, :3] = image
        canvas[top : top + h, left : left + w, 3] = 255
    return canvas, places


def _gap(images: Pixels) -> int:
    return max(1, int(max(images.shape[1:3])) // 8)


# -- trajectory -----------------------------------------------------------------------------------


def _trajectory(data: FigureData) -> Picture:
    models, experts = data.meta["models"], data.arrays["experts"]
    timesteps, columns = data.arrays["timesteps"], len(data.arrays["timesteps"]) + 1
    rows = [smaller(data.arrays[f"{kind}_{name}"], FOLLOWED) for name in models for kind in ("x_t", "x_0")]
    ends = [smaller(data.arrays[f"grid_{name}"][:1], FOLLOWED) for name in models for _ in range(2)]
    images = np.concatenate([part for row, end in zip(rows, ends, strict=True) for part in (row, end)])
    high, wide = images.shape[1:3]
    height = 0.55 + 6.05 / columns * len(rows) * high / wide + 0.2 * -(-len(np.unique(experts)) // 4)

    def draw(figure: Any) -> None:
        axes, gap = figure.add_subplot(), max(2, max(high, wide) // 6)
        canvas, places = tiled(images, columns, gap)
        for k in range(1, len(rows), 2):  # the last x_0 would be the image once more
            left, top = places[(k + 1) * columns - 1]
            canvas[top : top + high, left : left + wide] = 0
        axes.imshow(canvas, interpolation="none")
        for k, (left, top) in enumerate(places):
            row, step = divmod(k, columns)
            if step < len(experts):
                acts = models[row // 2] in ACTS
                _frame(axes, (left, top, wide, high), int(experts[step]), gap, acts=acts)
        _labelled(axes, models, timesteps, places, columns, (wide, high))
        _legend(figure, data)

    shown_steps = "all" if len(timesteps) == data.meta["num_steps"] else str(len(timesteps))
    caption = (
        f"{_parted(data)}One image shows where the models part, not which is better. Its way through {shown_steps} of "
        f"the {data.meta['num_steps']} steps of {data.meta['sampler']}{_first_asked(data)}: x_t, what a model gets at "
        "timestep t, and the clean image x_0 that it predicts from it; all begin with the same noise. A frame has the "
        "colour of the expert that serves t: in the ensemble it acts (thick), others are one model for all t (thin)."
        f"{_reduced(data, images)}"
    )
    alt = (
        f"Rows of small images from noise on the left to the sample on the right, two for each of {_listed(models)}: "
        f"x_t, and the clean image predicted, framed by {len(np.unique(experts))} colours of experts."
    )
    return Picture("trajectory", "One image's way through the steps", caption, alt, draw, 7.0, height)


def _frame(axes: Any, box: tuple[int, int, int, int], expert: int, gap: int, *, acts: bool) -> None:
    from matplotlib.patches import Rectangle

    left, top, wide, high = box
    away = gap / 8
    corner, size = (left - 0.5 - away, top - 0.5 - away), (wide + 2 * away, high + 2 * away)
    thick = 2.2 if acts else 0.9
    axes.add_patch(Rectangle(corner, *size, facecolor="none", linewidth=thick, clip_on=False, **_look(expert)))


def _look(expert: int) -> dict[str, Any]:
    """Of an expert's frames: its colour, and dashed where the colours begin again."""
    again, colour = divmod(expert, len(COLOURS))
    return {"edgecolor": COLOURS[colour], "linestyle": DASHES[again % len(DASHES)]}


def _labelled(
    axes: Any,
    models: Sequence[str],
    timesteps: npt.NDArray[Any],
    places: Sequence[tuple[int, int]],
    columns: int,
    size: tuple[int, int],
) -> None:
    wide, high = size
    ticks = [places[k][0] + (wide - 1) / 2 for k in range(columns)]
    axes.set_xticks(ticks, [*(f"{t:.0f}" if t == round(t) else f"{t:.1f}" for t in timesteps), "image"])
    axes.set_yticks(
        [places[row * columns][1] + (high - 1) / 2 for row in range(2 * len(models))],
        [f"{name}  {kind}" for name in models for kind in ("$x_t$", "$x_0$")],
        parse_math=True,
    )
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("timestep t")
    axes.tick_params(length=0, labelsize=7.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(figure: Any, data: FigureData) -> None:
    from matplotlib.patches import Patch

    acting = [int(i) for i in np.unique(data.arrays["experts"])]
    names = data.meta["names"]
    handles = [Patch(facecolor="none", linewidth=2.2, **_look(i)) for i in acting]
    figure.legend(
        handles,
        [names[i] for i in acting],
        loc="outside lower center",
        ncols=min(4, len(acting)),
        fontsize=8,
        handlelength=1.2,
        labelcolor=INK,
    )


# -- words ----------------------------------------------------------------------------------------


def _changed(data: FigureData) -> str:
    base, *others = data.meta["models"]
    said = [f"{name} by {data.meta['changed'][name]:.3g}" for name in others]
    return f"Pixels differ from those of {base} on average, of 255: {', '.join(said)}. " if said else ""


def _asked(data: FigureData) -> str:
    """That prompts are alike too, and the first of them."""
    prompts = data.meta.get("prompts") or []
    if not prompts:
        return ""
    listed = "; ".join(_quoted(prompt) for prompt in prompts[:TOLD])
    return f" and prompt (row by row: {listed}{' ...' if len(prompts) > TOLD else ''})"


def _first_asked(data: FigureData) -> str:
    prompts = data.meta.get("prompts") or []
    return f", asked for by {_quoted(prompts[0])}" if prompts else ""


def _quoted(prompt: object) -> str:
    return f"class {prompt}" if isinstance(prompt, int) else f"“{prompt or ''}”"


def _parted(data: FigureData) -> str:
    """Between which of the shown steps each model's x_0 is farthest from the base's, and how far."""
    base, *others = data.meta["models"]
    clean = {name: data.arrays[f"x_0_{name}"].astype(np.float64) for name in data.meta["models"]}
    apart = {name: np.abs(clean[name] - clean[base]).mean((1, 2, 3)) for name in others}
    at = {name: data.arrays["timesteps"][way.argmax()] for name, way in apart.items()}
    said = [f"{name} by {way.max():.3g} at t = {at[name]:.0f}" for name, way in apart.items()]
    return f"The predicted clean images differ most from those of {base}, of 255: {', '.join(said)}. " if said else ""


def _reduced(data: FigureData, drawn: Pixels) -> str:
    high, wide = data.meta["size"]
    if drawn.shape[1:3] == (high, wide):
        return ""
    return f" Images of {wide} x {high} pixels are shown reduced to {drawn.shape[2]} x {drawn.shape[1]}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
