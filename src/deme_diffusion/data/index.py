"""One pass over a data set: what is readable, each image's split, label, captions, and (if they fit) the pixels."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deme_diffusion.config import DataSettings
from deme_diffusion.data.captions import CAPTIONS, NAMED, Captionfile, Counted, unlisted
from deme_diffusion.data.classes import Classes
from deme_diffusion.data.prepare import Corrupt, Encoded, as_array, decode, in_mode, prepared
from deme_diffusion.data.sources import Pixels, SplitName
from deme_diffusion.data.splits import SPLITS, split_of
from deme_diffusion.data.table import Table
from deme_diffusion.errors import UserError
from deme_diffusion.files import write_json

log = logging.getLogger(__name__)
INDEX, SUMMARY, PIXELS = "index.npz", "index.json", "pixels.bin"
UNREADABLE = -1
CHUNK, LISTED = 256, 20


@dataclass(frozen=True)
class Scanned:
    """One row: its raw size and mode, split and prepared pixels, or why it cannot be read."""

    index: int
    label: Any
    size: tuple[int, int] | None = None
    mode: str = ""
    split: SplitName | None = None
    pixels: Pixels | None = None
    problem: str = ""
    captions: Sequence[str] = ()


@dataclass
class Summary:
    """What a pass has seen; the share of unreadable images decides whether the data set is accepted."""

    images: int = 0
    corrupt: list[tuple[int, str]] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)

    def add(self, row: Scanned) -> None:
        """Count one row."""
        self.images += 1
        if row.pixels is None or row.size is None or row.split is None:
            self.corrupt.append((row.index, row.problem))
            return
        self.sizes[row.size] += 1
        self.modes[row.mode] += 1
        self.shapes[row.pixels.shape] += 1
        self.splits[row.split] += 1

    def check(self, settings: DataSettings) -> None:
        """Raises UserError where there are no images, too many unreadable ones, or sizes that cannot share a batch."""
        where = f"data.path: {settings.path}"
        if not self.images:
            raise UserError(f"{where} has no images")
        if len(self.corrupt) > settings.max_corrupt * self.images:
            first = "; ".join(f"number {i}: {why}" for i, why in self.corrupt[:3])
            raise UserError(
                f"{where}: {len(self.corrupt)} of {self.images} images cannot be read, more than the share "
                f"data.max_corrupt={settings.max_corrupt:g} that is skipped ({first}); deme doctor lists them"
            )
        if settings.resolution is None and len(self.shapes) > 1:
            common = ", ".join(f"{w}x{h}" for (h, w, _), _ in self.shapes.most_common(3))
            raise UserError(f"{where}: images of {len(self.shapes)} sizes ({common}, ...); set data.resolution")

    def as_dict(self) -> dict[str, Any]:
        """Plain values; at most 20 of the unreadable images and of the sizes are listed."""
        sizes = {f"{w}x{h}": n for (w, h), n in self.sizes.most_common(LISTED)}
        corrupt = [{"index": i, "problem": why} for i, why in self.corrupt[:LISTED]]
        counts = {"images": self.images, "unreadable": len(self.corrupt), "splits": dict(self.splits)}
        return {**counts, "sizes": sizes, "modes": dict(self.modes), "corrupt": corrupt}


def scan(table: Table, settings: DataSettings, threads: int = 4) -> Iterator[Scanned]:
    """Every row in order, decoded and prepared by several threads (PIL decodes outside the interpreter's lock)."""
    rows, numbers = table.captioned(), count()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        while chunk := list(islice(rows, CHUNK)):
            yield from pool.map(lambda row, i: _scanned(i, row, settings), chunk, numbers)


def _scanned(index: int, row: tuple[Encoded | None, Any, list[str]], settings: DataSettings) -> Scanned:
    encoded, label, captions = row
    try:
        if encoded is None:
            raise Corrupt("empty")
        image = decode(encoded)
        raw = in_mode(image, settings.mode)
        pixels = prepared(raw, settings)
    except Corrupt as problem:
        named = f"{encoded.parent.name}/{encoded.name}: " if isinstance(encoded, Path) else ""
        return Scanned(index, label, problem=f"{named}{problem}")
    return Scanned(index, label, image.size, image.mode, split_of(as_array(raw), settings), pixels, captions=captions)


class Pixelfile:
    """Prepared pixels one after another in a file, until they pass `limit` bytes: then none are stored."""

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit, self.offsets = path, limit, [0]
        self.file: BinaryIO | None = path.open("wb")

    def add(self, pixels: Pixels | None) -> None:
        """Append one image; None takes no room."""
        size = 0 if pixels is None else pixels.nbytes
        self.offsets.append(self.offsets[-1] + size)
        if self.file is not None and self.offsets[-1] > self.limit:
            self.close()
            self.path.unlink()
        elif self.file is not None and pixels is not None:
            self.file.write(pixels.tobytes())

    def close(self) -> None:
        """Close the file, if it is still being written."""
        if self.file is not None:
            self.file.close()
            self.file = None


def make_index(
    settings: DataSettings,
    folder: Path,
    *,
    commit: str | None,
    limit: float,
    captioned: bool = False,
    classed: bool = False,
) -> dict[str, Any]:
    """Scan the data set into `folder`: `index.npz`, `index.json`, and `pixels.bin` where they fit into `limit` bytes.

    `captioned`: `captions.jsonl` too; `classed`: also which classes the labels are in the data set. Raises UserError
    for what `Table` and `Summary.check` refuse.
    """
    if settings.source == "folder":
        _warn_of_unlisted(settings)
    table = Table(settings, commit, captioned=captioned)
    if settings.streaming:
        limit = float("inf")  # what streams past is kept, or it would have to stream past for every epoch
    summary, splits, labels, shapes = Summary(), list[int](), list[Any](), list[tuple[int, ...]]()
    told = Counted()
    with ExitStack() as stack:
        stored = Pixelfile(folder / PIXELS, limit)
        stack.callback(stored.close)
        said = Captionfile(folder / CAPTIONS) if captioned else None
        if said is not None:
            stack.enter_context(said.file)
        for row in scan(table, settings):
            summary.add(row)
            stored.add(row.pixels)
            if said is not None:
                said.add(row.captions)
                if row.split is not None:
                    told.add(row.index, row.captions)
            splits.append(UNREADABLE if row.split is None else SPLITS.index(row.split))
            labels.append(row.label)
            shapes.append((0, 0, 0) if row.pixels is None else row.pixels.shape)
    summary.check(settings)
    for problem in summary.corrupt[:LISTED]:
        log.warning("data: image %d is skipped: %s", *problem)
    arrays: dict[str, Any] = {
        "split": np.array(splits, np.int8),
        "offset": np.array(stored.offsets),
        "shape": np.array(shapes),
    }
    if said is not None:
        arrays["caption"] = np.array(said.offsets)
    arrays |= _classes(labels, table.names) if classed else {}
    np.savez(folder / INDEX, **(arrays | _labels(labels)))
    seen = {**summary.as_dict(), **({"captions": told.as_dict()} if captioned else {})}
    write_json(folder / SUMMARY, seen)
    return seen


def _warn_of_unlisted(settings: DataSettings) -> None:
    if left := unlisted(settings):
        named = ", ".join(left[:NAMED]) + (", ..." if len(left) > NAMED else "")
        log.warning("data: %d images have no line in metadata.jsonl, and are left out: %s", len(left), named)


def _labels(labels: list[Any]) -> dict[str, np.ndarray]:
    """Labels as class numbers 0, 1, ..., in order of their values or names; a missing one is -1; without any, nothing.

    A negative number is missing too, as data sets on the hub have it.
    """
    if not (order := _order(labels)):
        return {}
    number = {label: i for i, label in enumerate(order)}
    return {"label": np.array([number.get(label, -1) for label in labels])}


def _order(labels: list[Any]) -> list[Any]:
    """The values that are no missing ones, in order."""
    known = {label for label in labels if label is not None and not (isinstance(label, int) and label < 0)}
    return sorted(known) if all(isinstance(label, int) for label in known) else sorted(known, key=str)


def _classes(labels: list[Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Of each class number the data set's own, and what it names its classes."""
    order = _order(labels)
    numbered = all(isinstance(label, int) for label in order)
    called = names if numbered else [str(label) for label in order]
    own = {"class": np.array(order if numbered else range(len(order)), np.int64)}
    return {**own, **({"class_name": np.array(called, str)} if called else {})} if order else {}


class Indexed:
    """The source that `make_index` left in a folder: stored pixels are mapped, others decoded again."""

    def __init__(self, settings: DataSettings, folder: Path, commit: str | None = None) -> None:
        self.settings, self._folder, self._commit = settings, folder, commit
        with np.load(folder / INDEX) as index:
            arrays = {name: index[name] for name in index.files}
        self.split, self._offset, self._shape = arrays["split"], arrays["offset"], arrays["shape"]
        self._labels: np.ndarray | None = arrays.get("label")
        self._caption: np.ndarray | None = arrays.get("caption")
        self._class, self._names = arrays.get("class"), arrays.get("class_name")
        self._pixels, self._captions = _mapped(folder / PIXELS), _mapped(folder / CAPTIONS)
        self._table: Table | None = None

    def __len__(self) -> int:
        return len(self.split)

    def pixels(self, index: int) -> Pixels:
        """uint8 (h, w, c): prepared, and square unless `data.crop` is random."""
        if self._pixels is not None:
            return np.asarray(self._pixels[self._offset[index] : self._offset[index + 1]].reshape(self._shape[index]))
        self._table = self._table or Table(self.settings, self._commit)
        encoded = self._table.encoded(index)
        assert encoded is not None, "an unreadable image is in no split"
        return prepared(decode(encoded), self.settings)

    def label(self, index: int) -> int | None:
        """The class, or None."""
        return None if self._labels is None or self._labels[index] < 0 else int(self._labels[index])

    @property
    def classes(self) -> Classes:
        """Which classes the labels are in the data set, of an index that was made with them."""
        names = () if self._names is None else tuple(str(name) for name in self._names)
        return Classes(() if self._class is None else self._class.tolist(), names)

    def captions(self, index: int) -> Sequence[str]:
        """Its captions, of an index that was made with them."""
        if not self.has_captions(index):
            return []
        assert self._caption is not None, "it has captions"
        assert self._captions is not None, "it has captions"
        found: list[str] = json.loads(self._captions[self._caption[index] : self._caption[index + 1]].tobytes())
        return found

    def has_captions(self, index: int) -> bool:
        """Whether it has some."""
        return self._caption is not None and bool(self._caption[index + 1] > self._caption[index])

    def called(self, index: int) -> str:
        """How a reader finds an image: by its file's name, where it has one, else by its number."""
        self._table = self._table or Table(self.settings, self._commit)
        encoded = None if self.settings.streaming else self._table.encoded(index)
        return f"{encoded.parent.name}/{encoded.name}" if isinstance(encoded, Path) else f"number {index}"

    def __getstate__(self) -> dict[str, Any]:
        """Loader processes map the files and open the table anew."""
        return {**self.__dict__, "_table": None, "_pixels": None, "_captions": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._pixels, self._captions = _mapped(self._folder / PIXELS), _mapped(self._folder / CAPTIONS)


def _mapped(file: Path) -> np.ndarray | None:
    return np.memmap(file, np.uint8, "r") if file.is_file() and file.stat().st_size else None
