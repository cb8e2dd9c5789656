"""The figures of a run as its index tells them: what is embedded lies in the folder `figures`, and nothing else."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from deme_diffusion.config import FIGURES
from deme_diffusion.errors import UserError
from deme_diffusion.report.album import Album
from deme_diffusion.report.words import two_parts

FOLDER = "figures"
INCH = 96  # CSS pixels
WIDEST = 100.0  # inches
TEXTS = ("kind", "name", "title", "caption", "alt")


def figures_told(entries: object, folder: Path, album: Album) -> tuple[list[dict[str, Any]], list[str]]:
    """The pictures of an index as the templates take them, and a line for each entry that cannot be shown."""
    pictures, problems = [], []
    for one in entries if isinstance(entries, list | tuple) else ():
        try:
            pictures.append(_told(one, folder, album))
        except UserError as error:
            problems.append(str(error))
    return pictures, problems


def analyze_command(folder: Path, kinds: Sequence[str] = FIGURES) -> str:
    """How the figures of these kinds are made in a run folder."""
    where = shlex.quote(str(folder)) if folder.parts else "RUN"
    chosen = "" if len(kinds) == len(FIGURES) else "".join(f" --figure {kind}" for kind in kinds)
    return f"deme analyze {where}{chosen}"


def _told(one: object, folder: Path, album: Album) -> dict[str, Any]:
    """One picture with its image. Raises UserError where the entry is none, or names a file that lies elsewhere."""
    if not isinstance(one, Mapping) or not all(isinstance(one.get(key), str) for key in TEXTS):
        raise UserError("an entry of the figures is left out: it has no kind, name, title, caption and alt")
    try:
        width, height = (_inches(one.get(key)) for key in ("width", "height"))
        svg, png = (_file(folder, one.get(kind), kind) for kind in ("svg", "png"))
        data = _names(one.get("data"))
    except (ValueError, OSError) as error:
        raise UserError(f"the figure {_text(one['name'])!r} is left out: {error}") from None
    shown, how = two_parts(_text(one["caption"]))
    there = [f"{FOLDER}/{file.name}" for file in (svg, png) if file.is_file()]
    return {
        **{key: _text(one[key]) for key in ("kind", "name", "title", "alt")},
        "caption": shown,
        "how": how,
        "width": round(width * INCH),
        "height": round(height * INCH),
        "image": album.drawn(svg, png),
        "files": [*data, *there],
    }


def _inches(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= WIDEST:
        raise ValueError("its width and height are no inches")
    return float(value)


def _names(value: object) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError("its data are no names of files")
    return [_text(name) for name in value]


def _file(folder: Path, name: object, suffix: str) -> Path:
    """The file of this name, there or not: bare in the folder `figures` of the run, regular, and no link."""
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f"its {suffix} is no name of a file")
    parts = PurePath(name).parts
    if len(parts) != 2 or parts[0] != FOLDER or Path(parts[1]).suffix != f".{suffix}":
        raise ValueError(f"{name!r} is no {suffix} in the folder {FOLDER}")
    path, lies = folder / FOLDER / parts[1], Path(os.path.realpath(folder), FOLDER, parts[1])
    if path.is_symlink() or Path(os.path.realpath(path)) != lies or (path.exists() and not path.is_file()):
        raise ValueError(f"{name!r} is a link, or no file")
    return path


def _text(given: str) -> str:
    """What can be written: JSON may hold half a character."""
    return given.encode(errors="replace").decode()
