"""Sample grids, loss curves, and the paper's figures as they lie on disk."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from deme_diffusion.config import FIGURES
from deme_diffusion.report.album import JPEG, PNG, Album, Form
from deme_diffusion.report.cells import REAL_IMAGES, difference_said
from deme_diffusion.report.page.drawn import analyze_command, figures_told
from deme_diffusion.report.words import bounded

GRID_COLUMNS, GRID_IMAGES = (8, (64, 32, 16, 8))  # how many images a grid shows: fewer where there is no room
GRID_WIDTH, TILE = 400, 100  # pixels across at least, of small images; and of each image at most
SAMPLES = "samples"  # the picture of the figure `trajectory` that repeats the grids
HEADINGS = {
    "similarity": "Gradient similarity between timesteps",
    "activations": "What finetuning changes in the activations",
    "landscape": "Loss landscape around the base",
    "plane": "Loss on the plane of two task vectors",
    "vectors": "Task vectors by layer",
    "trajectory": "Samples, and one image's way through the steps",
}
VALIDATION = "validation"
CHANGE = "against optimizer steps, as each line's change since its first value"
Run = Mapping[str, Any]
Curves = Mapping[str, Sequence[Sequence[float]]]


def grids_section(run: Run, folder: Path, album: Album) -> list[dict[str, Any]]:
    """The grids, all of as many images."""
    return [_grid(label, folder / path, album) for label, path in (run.get("grids") or {}).items()]


def prompts_section(run: Run) -> list[str]:
    """What the images of every grid were asked for by, in their order; nothing where the model takes nothing."""
    asked = (run.get("prompts") or ())[: max(GRID_IMAGES)]
    return [f"class {prompt}" if isinstance(prompt, int) else str(prompt or "no words") for prompt in asked]


def _grid(label: str, path: Path, album: Album) -> dict[str, Any]:
    """A grid as an image, or the reason why there is none; pickles are never loaded."""
    try:
        images: NDArray[np.uint8] = np.load(path, allow_pickle=False)[: max(GRID_IMAGES)]
        counts = [len(images), *(count for count in GRID_IMAGES if count < len(images))]
        forms = [_grid_form(images[:count], f"the first {count}" if count < len(images) else "") for count in counts]
        forms[0].make()
    except (OSError, ValueError, EOFError, IndexError) as error:
        return {"label": label, "image": None, "note": f"{path.name}: {error}"}
    kind = "images" if label == REAL_IMAGES else "samples"
    return {"label": label, "image": album.add(forms, group="grids"), "note": f"{len(images)} {kind}"}


def _grid_form(images: NDArray[np.uint8], note: str) -> Form:
    """Small images enlarged by whole numbers; large ones reduced, and as JPEG."""
    from deme_diffusion.report.figures import reduced, sample_grid

    side = images.shape[2]
    if side <= TILE:
        scale = max(1, GRID_WIDTH // (GRID_COLUMNS * (side + 1)))
        return Form(PNG, lambda: sample_grid(images, GRID_COLUMNS, scale), note)
    return Form(JPEG, lambda: _as_jpeg(sample_grid(reduced(images, TILE), GRID_COLUMNS, 1)), note)


def _as_jpeg(png: bytes) -> bytes:
    out = io.BytesIO()
    Picture.open(io.BytesIO(png)).save(out, format="JPEG", quality=90, optimize=True)
    return out.getvalue()


def curves_section(run: Run, album: Album) -> list[dict[str, Any]]:
    """A plot for each kind of loss that was noted."""
    plots = [(name, series) for name, series in (run.get("curves") or {}).items() if series]
    if not plots:
        return []
    from deme_diffusion.report.figures import curves

    found = []
    for name, series in plots:
        changes = _changes(series) if name.startswith(VALIDATION) else None
        if changes is None:
            image, said = album.svg(curves(series, name)), "against optimizer steps"
        else:
            image, said = album.svg(curves(changes, "change since the first value (%)")), CHANGE
        found.append({"name": name, "said": said, "alt": _curves_told(name, series, changes), "image": image})
    return found


def _changes(series: Curves) -> dict[str, list[tuple[float, float]]] | None:
    """Each line's change since its first value in %: of several ranges the losses lie far apart, and look flat."""
    changes = {}
    for label, points in series.items():
        known = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
        if known and not known[0][1]:
            return None
        changes[label] = [(step, 100 * (value / known[0][1] - 1)) for step, value in known]
    return changes


def _curves_told(name: str, series: Curves, changes: Curves | None) -> str:
    """First value of each line, and its last one or the change until then, as they are drawn."""
    from deme_diffusion.report.figures import thinned

    told = []
    for label, points in series.items():
        steps, values = thinned(points)
        if not len(steps):
            told.append(label)
        elif changes is None:
            told.append(f"{label} from {values[0]:.3g} to {values[-1]:.3g} at step {steps[-1]:,.0f}")
        else:
            change = difference_said(thinned(changes[label])[1][-1], None)
            told.append(f"{label} {values[0]:.3g}, {change} % at step {steps[-1]:,.0f}")
    how = "against optimizer steps" if changes is None else "first, and its change in % by optimizer steps"
    return f"{name} {how}: {bounded(told)}"


def grids_said(run: Run) -> str:
    """What the grids show: in the words of the picture that would repeat them, where there is one."""
    return str((_repeated(run) or {}).get("caption") or "The same place in every grid of samples has the same seed.")


def _repeated(run: Run) -> Mapping[str, Any] | None:
    """The picture of the same samples as the grids, where there are grids."""
    listed = (one for one in run.get("figures") or () if isinstance(one, Mapping) and one.get("name") == SAMPLES)
    return next(listed, None) if run.get("grids") else None


def figures_section(run: Run, folder: Path, album: Album) -> dict[str, Any] | None:
    """The pictures in the paper's order, and how those that are missing are made; None in a page of no run.

    Where grids are shown, the same samples are not shown again.
    """
    if run.get("figures") is None:
        return None
    again = _repeated(run)
    listed = [one for one in run["figures"] if again is None or one is not again]
    pictures, problems = figures_told(listed, folder, album)
    order = {kind: i for i, kind in enumerate(FIGURES)}
    pictures.sort(key=lambda one: order.get(one["kind"], len(order)))
    shown = {one["kind"] for one in (*pictures, *([again] if again else []))}
    missing = [kind for kind in FIGURES if kind not in shown]
    told = {"missing": [HEADINGS[kind] for kind in missing], "command": analyze_command(folder, missing)}
    return {"pictures": pictures, "problems": problems, **told}
