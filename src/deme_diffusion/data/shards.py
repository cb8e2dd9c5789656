"""Tar shards of WebDataset: which columns their samples have, by the first shard's beginning. No torch."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deme_diffusion.data.contents import IMAGES
from deme_diffusion.errors import UserError

LOOKED_AT = 1000
"""Members of the first shard by which columns are known: samples may lack some, and the first few say little."""
PARSED = 20
"""Of JSON members: how many are read for the names and kinds of what is in them."""
TEXT, NUMBERS, RECORDS = ("txt", "text", "transcript"), ("cls", "cls2", "index", "inx", "id"), ("json", "jsn")
"""Endings that `datasets` decodes, and as what."""
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


def columns_of(files: Sequence[Path]) -> Any:
    """The `datasets` features of what training may read: images, text, numbers, records; the rest is never unpacked.

    Raises UserError for a shard without samples.
    """
    import datasets

    found: dict[str, Any] = {}
    records: dict[str, list[Any]] = {}
    with tarfile.open(files[0]) as tar:
        for column, member in _members(tar):
            ending = column.rpartition(".")[-1].lower()
            if f".{ending}" in IMAGES:
                found[column] = datasets.Image()
            elif ending in TEXT or ending in NUMBERS:
                found[column] = datasets.Value("string" if ending in TEXT else "int64")
            elif ending in RECORDS and len(records.setdefault(column, [])) < PARSED:
                opened = tar.extractfile(member)
                records[column].append(json.loads(opened.read()) if opened else None)
    if not found:
        raise UserError(f"data.path: {files[0]} has no samples: images and captions of one name, as 0001.jpg, 0001.txt")
    return datasets.Features({**found, **{column: _kind(some) for column, some in records.items()}})


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The first files of a shard by their columns: what follows the first point of a name."""
    for number, member in enumerate(tar):
        if number >= LOOKED_AT:
            return
        if member.isfile() and (parts := _NAME.match(member.name)):
            yield parts[2], member


def _kind(records: Sequence[Any]) -> Any:
    """The feature of JSON members, in which some may lack what others have."""
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    return datasets.Features.from_arrow_schema(pa.table({"json": pa.array(records)}).schema)["json"]


def undecodable(files: Sequence[Path]) -> str:
    """The first text member that is not UTF-8, told by its name; '' where all are."""
    for file in files:
        with tarfile.open(file) as tar:
            for member in tar:
                parts = _NAME.match(member.name)
                if parts is None or parts[2].rpartition(".")[-1].lower() not in (*TEXT, *RECORDS):
                    continue
                opened = tar.extractfile(member)
                try:
                    _ = opened.read().decode() if opened else ""
                except UnicodeDecodeError:
                    return f"; {member.name} of {file.name} is not UTF-8"
    return ""
