"""The figures of a run: drawn from their data into RUN/figures as SVG and PNG, once; computes nothing. No torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deme_diffusion.config import FigureName
from deme_diffusion.errors import UserError
from deme_diffusion.figure_file import FigureData, read_figure
from deme_diffusion.files import file_digest, link, write_bytes, write_json
from deme_diffusion.report.drawing import activations, landscape, plane, similarity, trajectory, vectors
from deme_diffusion.report.drawing.picture import Picture
from deme_diffusion.report.figures import png_of, svg_of

log = logging.getLogger(__name__)
FOLDER, INDEX = "figures", "figures.json"
DRAWN = 1
"""Raised when a drawing changes, so that pictures on disk are drawn again."""
DRAWINGS: Mapping[FigureName, Callable[[Sequence[FigureData]], list[Picture]]] = {
    "similarity": similarity.pictures,
    "activations": activations.pictures,
    "landscape": landscape.pictures,
    "plane": plane.pictures,
    "vectors": vectors.pictures,
    "trajectory": trajectory.pictures,
}


def draw_figures(folder: Path, data: Mapping[FigureName, Mapping[str, Path]]) -> list[dict[str, Any]]:
    """Draw `data` (figure -> stem -> .npz) into `folder`/figures: what changed only; each .npz is linked beside.

    Returns: the pictures as the page takes them: kind, name, title, caption, alt, files `svg` and `png` and `data`
    relative to `folder`. Data that cannot be read is told and left out.
    """
    there = folder / FOLDER
    known = _known(there)
    entries: list[dict[str, Any]] = []
    for kind, files in data.items():
        stamp = {"drawn": DRAWN, **{stem: file_digest(file) for stem, file in files.items()}}
        before = known.get(kind)
        if (
            before
            and before["stamp"] == stamp
            and all((folder / one[k]).is_file() for one in before["pictures"] for k in ("svg", "png"))
        ):
            entries.append(before)
            continue
        try:
            pictures = DRAWINGS[kind]([read_figure(file) for file in files.values()])
        except UserError as error:
            log.warning("not drawn: %s", error)
            continue
        for stem, file in files.items():
            link(file, there / f"{stem}.npz")
        entries.append({"kind": kind, "stamp": stamp, "pictures": [_drawn(folder, kind, p, files) for p in pictures]})
    if entries != list(known.values()):
        write_json(there / INDEX, entries)
    return [picture for entry in entries for picture in entry["pictures"]]


def _drawn(folder: Path, kind: str, picture: Picture, files: Mapping[str, Path]) -> dict[str, Any]:
    names = {kind: f"{FOLDER}/{picture.name}.{kind}" for kind in ("svg", "png")}
    write_bytes(folder / names["svg"], svg_of(picture.draw, picture.width, picture.height))
    write_bytes(folder / names["png"], png_of(picture.draw, picture.width, picture.height))
    told = {"kind": kind, "name": picture.name, "title": picture.title, "caption": picture.caption, "alt": picture.alt}
    size = {"width": picture.width, "height": picture.height}
    return {**told, **size, **names, "data": [f"{FOLDER}/{stem}.npz" for stem in files]}


def _known(there: Path) -> dict[str, dict[str, Any]]:
    """What was drawn before, by kind; nothing where that cannot be told."""
    try:
        return {entry["kind"]: entry for entry in json.loads((there / INDEX).read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
