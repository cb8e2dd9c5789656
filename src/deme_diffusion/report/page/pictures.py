"""Sample grids, loss curves, and the paper's figures as they lie on disk."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from deme_diffusion.config import FIGURES
from deme_diffusion.report.album import JPEG, PNG, Album, Form
from deme_diffusion.report.cells import REAL_IMAGES

GRID_COLUMNS, GRID_IMAGES = (8, (64, 32, 16, 8))  # how many images a grid shows: fewer where there is no room
GRID_WIDTH, TILE = 400, 100  # pixels across at least, of small images; and of each image at most
INCH = 96  # CSS pixels
HEADINGS = {
    "similarity": "Gradient similarity between timesteps",
    "activations": "What finetuning changes in the activations",
    "landscape": "Loss landscape around the base",
    "plane": "Loss on the plane of two task vectors",
    "vectors": "Task vectors by layer",
    "trajectory": "Samples, and one image's way through the steps",
}
Run = Mapping[str, Any]


def grids_section(run: Run, folder: Path, album: Album) -> list[dict[str, Any]]:
    """The grids, all of as many images."""
    return [_grid(label, folder / path, album) for label, path in (run.get("grids") or {}).items()]


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
    from deme_diffusion.report.figures import sample_grid

    side = images.shape[2]
    if side <= TILE:
        scale = max(1, GRID_WIDTH // (GRID_COLUMNS * (side + 1)))
        return Form(PNG, lambda: sample_grid(images, GRID_COLUMNS, scale), note)
    return Form(JPEG, lambda: _as_jpeg(sample_grid(_reduced(images), GRID_COLUMNS, 1)), note)


def _reduced(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    high = max(1, round(TILE * images.shape[1] / images.shape[2]))
    small = [Picture.fromarray(image.squeeze()).resize((TILE, high), Picture.Resampling.LANCZOS) for image in images]
    return np.stack([np.array(one).reshape(high, TILE, -1) for one in small])


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

    return [
        {"name": name, "lines": ", ".join(series), "image": album.svg(curves(series, name))} for name, series in plots
    ]


def figures_section(run: Run, folder: Path, album: Album) -> dict[str, Any] | None:
    """The pictures in the paper's order, and how those that are missing are made; None in a page of no run."""
    drawn = run.get("figures")
    if drawn is None:
        return None
    order = {kind: i for i, kind in enumerate(FIGURES)}
    known = sorted(drawn, key=lambda one: order.get(one["kind"], len(order)))
    missing = [kind for kind in FIGURES if kind not in {one["kind"] for one in drawn}]
    pictures = [_figure(one, folder, album) for one in known]
    return {"pictures": pictures, "missing": [HEADINGS[kind] for kind in missing], "command": _command(folder, missing)}


def _figure(one: Mapping[str, Any], folder: Path, album: Album) -> dict[str, Any]:
    told = {key: one[key] for key in ("title", "caption", "alt")}
    size = {key: round(one[key] * INCH) for key in ("width", "height")}
    files = [one[key] for key in ("svg", "png") if (folder / one[key]).is_file()]
    return {
        **told,
        **size,
        "image": album.drawn(folder / one["svg"], folder / one["png"]),
        "files": [*one["data"], *files],
    }


def _command(folder: Path, missing: list[Any]) -> str:
    where = shlex.quote(str(folder)) if folder.parts else "RUN"
    chosen = "" if len(missing) == len(FIGURES) else "".join(f" --figure {kind}" for kind in missing)
    return f"deme analyze {where}{chosen}"
