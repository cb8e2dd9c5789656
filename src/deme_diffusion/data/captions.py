"""Captions of a table's rows: which column holds them, what a cell says, and which images have none. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_diffusion.config import DataSettings
from deme_diffusion.data.contents import METADATA, listed
from deme_diffusion.errors import UserError, nearest

USUAL = ("text", "caption", "txt")
"""Columns that hold captions where `data.caption_column` names none."""
CAPTIONS = "captions.jsonl"
"""A list of captions for each image; where each line begins is in the index."""
NAMED, LISTED = 3, 12
"""Of images that lack something, how many are named; of columns, how many are listed."""


def caption_column(settings: DataSettings, columns: Sequence[str]) -> str | None:
    """The column that holds captions, or a name inside one, as `json.caption`; None where there need not be one.

    Raises UserError where there is none of the name, or none at all although captions are asked for.
    """
    named = settings.caption_column
    if named is not None:
        if holder(named, columns) is None:
            told = f"{settings.path} has no column {named!r}{nearest(named, columns)}; {listing(columns)}"
            raise UserError(f"data.caption_column: {told}")
        return named
    found = usual(columns)
    if found is None and settings.missing_captions == "refuse":
        raise UserError(f"data.caption_column: {_none(settings, columns)}, or set data.missing_captions=empty")
    return found


def _none(settings: DataSettings, columns: Sequence[str]) -> str:
    others = [name for name in columns if name not in ("image", "label", "__key__", "__url__")]
    if settings.source == "folder" and not others:
        return f"{settings.path} has no captions: put a metadata.jsonl with file_name and text beside the images"
    return f"{settings.path} has no column {', '.join(USUAL[:-1])} or {USUAL[-1]}; {listing(columns)}; name one"


def usual(columns: Collection[str]) -> str | None:
    """The column that captions are in where none is named; None where there is none such."""
    return next((name for name in USUAL if name in columns), None)


def listing(columns: Sequence[str]) -> str:
    """The columns for a message; of very many the first."""
    return f"its columns: {', '.join(columns[:LISTED])}{', ...' if len(columns) > LISTED else ''}"


def holder(named: str, columns: Collection[str]) -> str | None:
    """The column that a name is in, as `json` of `json.caption`; None where there is none."""
    parts = named.split(".")
    starts = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((start for start in starts if start in columns), None)


def captions_in(row: Mapping[str, Any], column: str, image: str, *, as_json: bool = False) -> list[str]:
    """The captions of a row: one, several of a list, none of an empty cell; blanks at their ends are dropped.

    `image`: how it is called. `as_json`: the cell is JSON still. Raises UserError for a cell that holds no text.
    """
    held = holder(column, row)
    assert held is not None, "checked at opening"
    cell, inside = row[held], column.removeprefix(held).split(".")[1:]
    try:
        if as_json and cell is not None:
            cell = _parsed(cell, held)
        return [said for text in _texts(_inside([cell], inside) if inside else cell, column) if (said := text.strip())]
    except UserError as error:
        raise UserError(f"data.caption_column: {image}: {error}") from None


def _parsed(cell: str, column: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError as error:
        raise UserError(f"{column!r} is not JSON ({error})") from None


def _inside(values: list[Any], names: Sequence[str]) -> list[Any]:
    """What lies under these names, one within the other; of a list, in each of its entries."""
    for name in names:
        flat = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
        values = [entry.get(name) if isinstance(entry, dict) else None for entry in flat]
    return values


def _texts(cell: Any, column: str) -> Iterator[str]:
    if isinstance(cell, list):
        for entry in cell:
            yield from _texts(entry, column)
    elif isinstance(cell, str | bytes):
        yield _decoded(cell, column)
    elif cell is not None:
        found = ", ".join(cell) if isinstance(cell, dict) else cell
        inside = f"; name one of these as {column}.NAME" if isinstance(cell, dict) else ""
        raise UserError(f"{column!r} holds no text but {type(cell).__name__} ({found}){inside}")


def _decoded(text: str | bytes, column: str) -> str:
    try:  # a string may hold halves of characters, which JSON can write and no tokenizer takes
        return text.decode() if isinstance(text, bytes) else text.encode().decode()
    except UnicodeError as error:
        raise UserError(f"{column!r} holds text that is not UTF-8 ({error}); save it anew") from None


# -- metadata beside images -----------------------------------------------------------------------


def unlisted(settings: DataSettings) -> list[str]:
    """Images of a folder with a metadata.jsonl that have no line in it. Raises UserError for a line that is not JSON.

    A csv is only looked at for its encoding: `datasets` reads it, and leaves such images out as well.
    """
    files = listed(settings)
    tables = [file for file in files if file.name in METADATA]
    for table in tables:
        if table.suffix == ".csv":
            for _ in _lines(table):
                pass
    if any(table.suffix != ".jsonl" for table in tables) or not tables:
        return []
    named, kinds = set[Path](), dict[str, tuple[str, str]]()
    for table in tables:
        before = len(named)
        for number, record in _records(table):
            _check_kinds(record, f"{table}: line {number}", kinds)
            named.add(table.parent / str(record.get("file_name")))
        if len(named) == before:
            raise UserError(f"data.path: {table} is empty: it needs a line with file_name and text for each image")
    return [file.relative_to(root).as_posix() for root in [_root(settings)] for file in files
            if file not in tables and file not in named]  # fmt: skip


def _root(settings: DataSettings) -> Path:
    return Path(settings.path or "").expanduser().absolute()


def _lines(table: Path) -> Iterator[tuple[int, str]]:
    """Lines by number from 1. Raises UserError for one that is not UTF-8."""
    with table.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f"byte {line[error.start]:#04x} at column {error.start + 1}"
                raise UserError(f"data.path: {table}: line {number} is not UTF-8 ({what}); save it as UTF-8") from None


def _check_kinds(record: Mapping[str, Any], where: str, seen: dict[str, tuple[str, str]]) -> None:
    """Raises UserError where a column is of another kind than in a line before; `seen`: its kind, and the line."""
    names = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number", bool: "a boolean"}
    for column, value in record.items():
        if value is None:
            continue
        kind, first = seen.setdefault(column, (names[type(value)], where))
        if kind != names[type(value)]:
            told = f"{column!r} is {names[type(value)]}, but {kind} in {first}"
            raise UserError(f"data.path: {where}: {told}; write all lines alike")


def _records(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(table):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"data.path: {table}: line {number} is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"data.path: {table}: line {number} is not a JSON object with file_name and text")
        yield number, record


# -- kept -----------------------------------------------------------------------------------------


@dataclass
class Counted:
    """What a pass has seen of captions, of the images that can be read: how many, how long."""

    images: int = 0
    captions: int = 0
    characters: int = 0
    longest: int = 0
    distinct: set[bytes] = field(default_factory=set)
    missing: list[int] = field(default_factory=list)

    def add(self, index: int, captions: Sequence[str]) -> None:
        """Count those of one image."""
        self.images += 1
        if not captions:
            self.missing.append(index)
        self.captions += len(captions)
        self.characters += sum(map(len, captions))
        self.longest = max([self.longest, *map(len, captions)])
        self.distinct |= {hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions}

    def as_dict(self) -> dict[str, Any]:
        """Plain values; lengths in characters, and of the images without captions the first numbers."""
        mean = round(self.characters / self.captions, 1) if self.captions else 0.0
        counts = {"images": self.images, "captions": self.captions, "distinct": len(self.distinct)}
        missing = {"missing": len(self.missing), "first_missing": self.missing[: NAMED + 1]}
        return {**counts, **missing, "mean_length": mean, "longest": self.longest}


class Captionfile:
    """The captions of each image as a line of JSON, and where the lines begin."""

    def __init__(self, path: Path) -> None:
        self.offsets, self.file = [0], path.open("wb")

    def add(self, captions: Sequence[str]) -> None:
        """Append a line."""
        line = json.dumps(captions, ensure_ascii=False).encode() + b"\n" if captions else b""
        self.file.write(line)
        self.offsets.append(self.offsets[-1] + len(line))


# -- images without -------------------------------------------------------------------------------


def refusal(named: Sequence[str], missing: int, images: int, settings: DataSettings) -> str | None:
    """What to say of images without captions, the first of which are named; None where nothing is refused."""
    if not missing or settings.missing_captions == "empty":
        return None
    more = ", ..." if missing > NAMED else ""
    return (
        f"data: {settings.path or settings.source}: {missing:,} of {images:,} images have no caption "
        f"({', '.join(named[:NAMED])}{more}); complete them, name another data.caption_column, or train these "
        "without text by data.missing_captions=empty"
    )
