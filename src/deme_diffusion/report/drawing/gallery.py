"""The figures of a run: drawn from their data into RUN/figures as SVG and PNG, once; computes nothing. No torch."""

from __future__ import annotations

import json
import logging
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from deme_diffusion.config import FigureName
from deme_diffusion.errors import MachineError, UserError, nearest
from deme_diffusion.figure_file import FigureData, read_figure
from deme_diffusion.files import canonical_digest, file_digest, link, write_bytes, write_json
from deme_diffusion.report import figures
from deme_diffusion.report.drawing import (
    activations,
    contours,
    landscape,
    picture,
    plane,
    similarity,
    trajectory,
    vectors,
)
from deme_diffusion.report.drawing.picture import Picture
from deme_diffusion.report.figures import svg_and_png_of

log = logging.getLogger(__name__)
FOLDER, INDEX = "figures", "figures.json"
DRAWINGS: Mapping[FigureName, Callable[[Sequence[FigureData]], list[Picture]]] = {
    "similarity": similarity.pictures,
    "activations": activations.pictures,
    "landscape": landscape.pictures,
    "plane": plane.pictures,
    "vectors": vectors.pictures,
    "trajectory": trajectory.pictures,
}
TOGETHER = ("similarity",)
"""Figures whose data are several files, drawn together."""
SHARED: tuple[ModuleType, ...] = (picture, contours, figures)
BESIDE: Mapping[str, tuple[ModuleType, ...]] = {"plane": (landscape,)}
"""What draws figures beside their own modules: all of them, and some."""
STEM = re.compile(r"\w[\w.+-]*")
DATA = re.compile(rf"{FOLDER}/\w[\w.+-]*\.npz")
"""Names of pictures, and of the data linked beside them."""
MOST_INCHES = 100
Entry = dict[str, Any]
"""A figure in the index: kind, stamp (what it was drawn from, and by), and its pictures as the page takes them."""


def draw_figures(folder: Path, data: Mapping[FigureName, Mapping[str, Path]]) -> list[dict[str, Any]]:
    """Draw `data` (figure -> stem -> .npz) into `folder`/figures: what changed only; each .npz is linked beside.

    Returns: the pictures as the page takes them: kind, name, title, caption, alt, width and height in inches, files
    `svg` and `png` and `data` relative to `folder`. What cannot be read or drawn is told and left out. Figures that
    were drawn before and are not in `data` stay in the folder and its index.
    """
    known = _known(folder)
    entries: dict[str, Entry] = dict(known)
    for kind, files in data.items():
        stamp = {"drawn": _drawn_by(kind), **{stem: file_digest(file) for stem, file in files.items()}}
        _linked(folder, files)
        if kind in known and known[kind]["stamp"] == stamp and _whole(folder, known[kind]):
            continue
        entries.pop(kind, None)
        if (pictures := _drawn_or_told(folder, kind, files)) is not None:
            entries[kind] = {"kind": kind, "stamp": stamp, "pictures": pictures}
    entries = {kind: entries[kind] for kind in DRAWINGS if kind in entries}
    if entries != known:
        write_json(folder / FOLDER / INDEX, list(entries.values()))
        _drop(folder, _files(known.values()) - _files(entries.values()))
    return [picture for kind in data if kind in entries for picture in entries[kind]["pictures"]]


def draw_files(files: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Draw the data of figures wherever they lie into the folder `out`; those of several similarities together.

    Where two files hold the same figure, their names go before those of the pictures. Returns: as `draw_figures`, the
    pictures relative to `out`. Raises UserError for a file that is no figure's data, or cannot be drawn.
    """
    groups: dict[str, list[tuple[Path, FigureData]]] = {}
    for file in {file.resolve(): file for file in files}.values():
        groups.setdefault((data := read_figure(file)).kind, []).append((file, data))
        if data.kind not in DRAWINGS:
            raise UserError(f"{file}: figure {data.kind!r} is none of ours{nearest(data.kind, list(DRAWINGS))}")
    drawn = []
    for kind, group in groups.items():
        parts = [sorted(group, key=_widest_first)] if kind in TOGETHER else [[one] for one in group]
        prefixes = _prefixes([part[0][0] for part in parts])
        for part, prefix in zip(parts, prefixes, strict=True):
            drawn += _drawn_files(kind, part, out, prefix)
    return drawn


def _prefixes(files: Sequence[Path]) -> list[str]:
    """What tells the pictures of several files apart: their names, those of their runs, or numbers."""
    if len(files) == 1:
        return [""]
    runs = [file.absolute().parent for file in files]
    names = [(parent.parent if parent.name == FOLDER else parent).name for parent in runs]
    choices = ([file.stem for file in files], [f"{n}-{f.stem}" for n, f in zip(names, files, strict=True)])
    told = next((c for c in choices if len(set(c)) == len(c)), [f"{i}-{f.stem}" for i, f in enumerate(files)])
    return [f"{name}-" for name in told]


def _widest_first(one: tuple[Path, FigureData]) -> tuple[int, int]:
    """[0, T) before its ranges, and these by their timesteps, whatever the files are called."""
    runs = one[1].meta.get("subset") or [[0, 0]]
    return -sum(hi - lo for lo, hi in runs), runs[0][0]


def _drawn_files(kind: str, part: Sequence[tuple[Path, FigureData]], out: Path, prefix: str) -> list[dict[str, Any]]:
    names = [str(file.resolve()) for file, _ in part]
    try:
        pictures = _pictures(kind, [data for _, data in part])
        return [_drawn(out, "", kind, replace(picture, name=prefix + picture.name), names) for picture in pictures]
    except (UserError, MachineError):
        raise
    except Exception as error:
        raise UserError(f"{', '.join(names)}: cannot be drawn ({_said(error)})") from error


def _pictures(kind: str, data: Sequence[FigureData]) -> list[Picture]:
    """The pictures of one figure. Raises UserError where the data are another figure's."""
    if other := next((one.kind for one in data if one.kind != kind), None):
        raise UserError(f"data of the figure {other!r} where those of {kind!r} belong")
    return DRAWINGS[kind](data)  # type: ignore[index]


def _drawn_or_told(folder: Path, kind: str, files: Mapping[str, Path]) -> list[dict[str, Any]] | None:
    """The pictures of one figure in a run folder; None where they cannot be drawn, which must not cost the page."""
    try:
        pictures = _pictures(kind, [read_figure(file) for file in files.values()])
        linked = [f"{FOLDER}/{stem}.npz" for stem in files]
        return [_drawn(folder, FOLDER, kind, picture, linked) for picture in pictures]
    except MachineError:
        raise
    except Exception as error:
        log.warning("%s is not drawn: %s", kind, error if isinstance(error, UserError) else _said(error))
        log.debug("%s", kind, exc_info=error)
        return None


def _drawn(folder: Path, inner: str, kind: str, picture: Picture, data: Sequence[str]) -> dict[str, Any]:
    names = {kind: str(Path(inner) / f"{picture.name}.{kind}") for kind in ("svg", "png")}
    made = svg_and_png_of(picture.draw, picture.width, picture.height)
    for name, content in zip(names.values(), made, strict=True):  # only once both could be drawn
        write_bytes(folder / name, content)
    told = {"kind": kind, "name": picture.name, "title": picture.title, "caption": picture.caption, "alt": picture.alt}
    return {**told, "width": picture.width, "height": picture.height, **names, "data": list(data)}


def _drawn_by(kind: FigureName) -> str:
    """What draws a figure: where it changes, its pictures on disk are drawn again, and no others."""
    own = sys.modules[DRAWINGS[kind].__module__]
    files = [str(module.__file__) for module in (own, *BESIDE.get(kind, ()), *SHARED)]
    return canonical_digest([_digest(file) for file in files])[:16]


@cache
def _digest(source: str) -> str:
    return file_digest(Path(source)) if Path(source).is_file() else ""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# -- what is there --------------------------------------------------------------------------------


def _known(folder: Path) -> dict[str, Entry]:
    """What was drawn before, by kind; without entries that `_drawn` would not have written, be it for their paths."""
    try:
        held = json.loads((folder / FOLDER / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {entry["kind"]: entry for entry in held if _is_entry(entry)} if isinstance(held, list) else {}


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(kind := entry.get("kind"), str) or kind not in DRAWINGS:
        return False
    stamp, pictures = entry.get("stamp"), entry.get("pictures")
    return isinstance(stamp, dict) and isinstance(pictures, list) and all(_is_picture(kind, one) for one in pictures)


def _is_picture(kind: str, one: Any) -> bool:
    """Whether the index of a run folder, which may be a stranger's, names a picture in the folder `figures`."""
    if not isinstance(one, dict) or not isinstance(data := one.get("data"), list):
        return False
    texts = [one.get(name) for name in ("name", "title", "caption", "alt", "svg", "png")]
    if one.get("kind") != kind or not all(isinstance(text, str) for text in (*texts, *data)):
        return False
    files = [f"{FOLDER}/{one['name']}.{ending}" for ending in ("svg", "png")]
    placed = STEM.fullmatch(one["name"]) and [one["svg"], one["png"]] == files and all(map(DATA.fullmatch, data))
    return bool(placed) and _is_size(one.get("width")) and _is_size(one.get("height"))


def _is_size(inches: Any) -> bool:
    return isinstance(inches, int | float) and not isinstance(inches, bool) and 0 < inches <= MOST_INCHES


def _files(entries: Iterable[Entry]) -> set[str]:
    """What the pictures of some figures are made of, relative to the run folder."""
    pictures = [picture for entry in entries for picture in entry["pictures"]]
    return {str(name) for picture in pictures for name in (picture["svg"], picture["png"], *picture["data"])}


def _whole(folder: Path, entry: Entry) -> bool:
    """Whether its pictures are there: files of their own, since a link may lead to anything."""
    return all(_is_own_file(folder / picture[ending]) for picture in entry["pictures"] for ending in ("svg", "png"))


def _is_own_file(path: Path) -> bool:
    """Whether it is a regular file, and no symlink."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def _linked(folder: Path, files: Mapping[str, Path]) -> None:
    for stem, file in files.items():
        at = folder / FOLDER / f"{stem}.npz"
        if not (at.exists() and at.samefile(file)):
            link(file, at)


def _drop(folder: Path, names: Iterable[str]) -> None:
    """Remove pictures and links that no figure has any more; nothing but files of the folder `figures`."""
    for name in names:
        if (file := folder / name).parent == folder / FOLDER and file.suffix in (".svg", ".png", ".npz"):
            file.unlink(missing_ok=True)
