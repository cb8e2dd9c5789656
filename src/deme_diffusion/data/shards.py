"""Tar shards of WebDataset: the members that share a name before its first point are a sample. No torch."""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from deme_diffusion.data.contents import IMAGES
from deme_diffusion.digests import size_and_time
from deme_diffusion.errors import UserError
from deme_diffusion.files import require_space

LOOKED_AT, FEW = 1000, 20
"""Members of the first shard, and of each other, by which columns are known: samples may lack some."""
RECORDS = ("json", "jsn")
"""Endings of members in which captions have a name."""
KEY, IMAGE = "__key__", "image"
"""Columns of a row: how its sample is called, its image."""
WRITTEN = 100
"""Rows that are written at once, which are in memory together."""
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
Member = tuple[str, str, tarfile.TarInfo]
"""The name of its sample, its column, where it is."""


def columns_of(files: Sequence[Path]) -> dict[str, Any]:
    """What the heads of the shards hold: columns, of images and of what is read as text.

    Raises UserError for a file that is no tar, and where none has samples.
    """
    import datasets

    found: dict[str, Any] = {}
    for number, file in enumerate(files):
        with _Shard(file) as shard:
            for _, column, _ in islice(shard.members(), FEW if number else LOOKED_AT):
                found[column] = datasets.Image() if _is_image(column) else datasets.Value("string")
    if not found:
        raise UserError(f"data.path: {files[0]} has no samples: images and captions of one name, as 0001.jpg, 0001.txt")
    return found


def rows_of(files: Sequence[Path], image: str | None, texts: Sequence[str]) -> Any:
    """The samples as a data set of `datasets`, which copies them once: image, these columns as text, the name.

    `image`: its column; None: whichever member is one. Raises UserError that names what cannot be read.
    """
    from datasets import Features, Image, Value
    from datasets.io.generator import GeneratorDatasetInputStream

    features = Features({IMAGE: Image(decode=False), **{text: Value("string") for text in texts}, KEY: Value("string")})
    given = {"files": [(str(file), *size_and_time(file)) for file in files], "image": image, "texts": tuple(texts)}
    return GeneratorDatasetInputStream(_samples, features=features, gen_kwargs=given, writer_batch_size=WRITTEN).read()


def _samples(files: list[tuple[str, int, int]], image: str | None, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each sample that has something of what is wanted. It is run only where there is no copy yet."""
    from datasets import config

    require_space(Path(config.HF_DATASETS_CACHE), sum(size for _, size, _ in files))
    for name, _, _ in files:
        with _Shard(Path(name)) as shard:
            for key, members in groupby(shard.members(), key=lambda member: member[0]):
                if row := shard.row(key, members, image, texts):
                    yield row


class _Shard:
    """A tar file. Raises UserError, by its name, for one that is none or breaks off."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.tar = tarfile.open(file)  # noqa: SIM115
        except (tarfile.TarError, OSError, EOFError) as error:
            raise self._unreadable(error) from None

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.tar.close()

    def members(self) -> Iterator[Member]:
        """In order; of a name that begins with ./ without it."""
        try:
            for member in self.tar:
                if member.isfile() and (parts := _NAME.match(posixpath.normpath(member.name))):
                    yield parts[1], parts[2], member
        except (tarfile.TarError, OSError, EOFError) as error:
            raise self._unreadable(error) from None

    def row(self, key: str, members: Iterator[Member], image: str | None, texts: Sequence[str]) -> dict[str, Any]:
        """What is wanted of a sample; empty where it has nothing of it."""
        row: dict[str, Any] = {}
        shown: str | None = None
        for _, column, member in members:
            if column == image or (image is None and _is_image(column)):
                if shown not in (None, column):
                    told = f"{self.file}: {key} has several images ({shown}, {column})"
                    raise UserError(f"data.image_column: {told}; name one (a sample's name ends at its first point)")
                shown, row[IMAGE] = column, {"bytes": self._read(member), "path": None}
            elif column in texts:
                row[column] = self._text(member)
        return {IMAGE: None, **dict.fromkeys(texts), **row, KEY: f"{self.file.name}: {key}"} if row else {}

    def _read(self, member: tarfile.TarInfo) -> bytes:
        opened = self.tar.extractfile(member)
        return opened.read() if opened else b""

    def _text(self, member: tarfile.TarInfo) -> str:
        try:
            return self._read(member).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"data.path: {self.file}: {member.name} is not UTF-8 ({error}); save it anew") from None

    def _unreadable(self, error: Exception) -> UserError:
        reason = " ".join(str(error).partition(":")[0].split()) or type(error).__name__
        return UserError(f"data.path: {self.file} cannot be read as webdataset ({reason}); copy or make it again")


def _is_image(column: str) -> bool:
    return f".{column.rpartition('.')[-1].lower()}" in IMAGES
