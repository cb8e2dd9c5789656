"""Prompts in files: COCO's captions, PartiPrompts, class names, plain lists. No torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_diffusion.errors import UserError

TEXT = ("prompt", "text", "caption")
"""Columns or keys of a list of prompts, in any case."""
TEMPLATE = "a photo of a {}"
"""How a class of ImageNet is asked for."""
LISTS = (".txt", ".csv", ".jsonl", ".tsv")
"""Files that `listed` reads."""


@dataclass(frozen=True)
class Group:
    """Texts of which an image is asked for by one: the captions of an image, or one prompt."""

    texts: tuple[str, ...]
    category: str = ""


def captions_of_coco(path: Path, key: str) -> list[Group]:
    """The captions of each image of an annotation file of COCO, by the number of the image; or a list of prompts, as
    BK-SDM's metadata.csv is."""
    if path.suffix.lower() in LISTS:
        return listed(path, key)
    try:
        found = json.loads(_text(path, key))
        captions: dict[int, list[str]] = {}
        for entry in found["annotations"]:
            captions.setdefault(int(entry["image_id"]), []).append(_line(str(entry["caption"])))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        wanted = '"annotations", each with "image_id" and "caption"'
        raise UserError(f"{key}: {path} is not COCO's JSON ({wanted}): {type(error).__name__} {error}") from None
    full = {image: [caption for caption in texts if caption] for image, texts in captions.items()}
    return [Group(tuple(texts)) for _, texts in sorted(full.items()) if texts]


def parti_prompts(path: Path, key: str) -> list[Group]:
    """PartiPrompts.tsv, with its categories."""
    return [Group((row["prompt"],), row["category"]) for row in _rows(path, key, ("prompt", "category"))]


def class_names(path: Path, key: str) -> list[Group]:
    """'a photo of a NAME' for each line; of several names with commas between them, the first."""
    return [Group((TEMPLATE.format(line.split(",")[0].strip()),)) for line in _lines(_text(path, key))]


def listed(path: Path, key: str) -> list[Group]:
    """The prompts of a .txt, .csv, .jsonl or .tsv file, in their order; empty lines are passed over."""
    kind = path.suffix.lower()
    if kind == ".tsv":
        return [Group((row["text"],)) for row in _rows(path, key, ("text",))]
    if kind == ".csv":
        return [Group((text,)) for text in _of_csv(path, key)]
    if kind == ".jsonl":
        return [Group((text,)) for text in _of_json(path, key)]
    if kind != ".txt":
        raise UserError(f"{key}: {path} is no list of prompts; .txt, .csv, .jsonl and .tsv are")
    return [Group((line,)) for line in _lines(_text(path, key))]


def _of_json(path: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(_text(path, key).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise UserError(f"{key}: {path}, line {number}: no JSON ({error})") from None
        values = {str(k).lower(): v for k, v in record.items()} if isinstance(record, dict) else {}
        text = next((values[name] for name in TEXT if isinstance(values.get(name), str)), None)
        if text is None:
            raise UserError(f'{key}: {path}, line {number}: no "prompt", "text" or "caption" with a text')
        if _line(text):
            yield _line(text)


def _of_csv(path: Path, key: str) -> Iterator[str]:
    """The texts of a table with commas, in quotes where they hold some; its first line names the columns."""
    lines = csv.reader(_text(path, key).splitlines(keepends=True))
    first = next(lines, [])
    place = _place([name.strip().lower() for name in first], TEXT)
    if place is None:
        has = ", ".join(name.strip() for name in first if name.strip()) or "none"
        raise UserError(f"{key}: {path} has no column {', '.join(TEXT)} in its first line; it has {has}")
    for cells in lines:
        if any(cell.strip() for cell in cells) and len(cells) <= place:
            raise UserError(
                f"{key}: {path}, line {lines.line_num}: {len(cells)} columns where the first line has {len(first)}"
            )
        if cells and _line(cells[place] if len(cells) > place else ""):
            yield _line(cells[place])


def _rows(path: Path, key: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a table with tabs between its columns, whose names are in its first line, in any case; none without text.

    The column `text` is any of `TEXT`. Quotes are letters as others: PartiPrompts has them within prompts.
    """
    first, *lines = _text(path, key).split("\n")
    names = [name.strip().lower() for name in first.split("\t")]
    places = {column: _place(names, TEXT if column == "text" else (column,)) for column in columns}
    for column, place in places.items():
        if place is None:
            wanted = ", ".join(TEXT) if column == "text" else column.capitalize()
            has = ", ".join(name.strip() for name in first.split("\t") if name.strip()) or "none"
            raise UserError(f"{key}: {path} has no column {wanted} in its first line; it has {has}")
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        if len(cells) < len(names) and line.strip() and any(p is not None and p >= len(cells) for p in places.values()):
            raise UserError(f"{key}: {path}, line {number}: {len(cells)} columns where the first line has {len(names)}")
        row = {column: _line(cells[place]) for column, place in places.items() if place is not None and line.strip()}
        if row and row[columns[0]]:
            yield row


def _place(names: Sequence[str], wanted: Sequence[str]) -> int | None:
    return next((names.index(name) for name in wanted if name in names), None)


def _lines(text: str) -> list[str]:
    return [_line(line) for line in text.split("\n") if line.strip()]


def _line(text: str) -> str:
    """One line, with single spaces: COCO's captions end in newlines, some hold them."""
    return " ".join(text.split())


def _text(path: Path, key: str) -> str:
    """Raises UserError for what is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"{key}: {path} is not UTF-8 (line {line}); once: iconv -f latin1 -t utf-8 {path.name} > new{path.suffix}"
        ) from None
