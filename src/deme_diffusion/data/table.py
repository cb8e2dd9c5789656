"""Encoded images of a folder, parquet files, tar shards or a hub data set, by `datasets`; nothing is decoded here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from deme_diffusion.config import DataSettings
from deme_diffusion.data.captions import caption_column, captions_in, holder, listing, usual
from deme_diffusion.data.contents import METADATA, listed
from deme_diffusion.data.prepare import Encoded
from deme_diffusion.data.shards import IMAGE, KEY, RECORDS, columns_of, rows_of
from deme_diffusion.digests import size_and_time
from deme_diffusion.errors import MachineError, UserError, nearest
from deme_diffusion.files import require_space
from deme_diffusion.rng import generator

KINDS = {"folder": "imagefolder", "parquet": "parquet"}
"""Source -> what `datasets` calls it."""
Row = tuple[Encoded | None, Any]
"""An encoded image (None where the column is empty) and its label, None where there is none."""


class Table:
    """The rows of a data set with their columns found. Raises UserError: nothing there, no such column, no images.

    `captioned`: with their captions, which are looked for only then.
    """

    def __init__(self, settings: DataSettings, commit: str | None = None, *, captioned: bool = False) -> None:
        self.settings = settings
        shards = listed(settings) if settings.source == "webdataset" else []
        self.rows: Any = None
        if shards:
            features = columns_of(shards)
        else:
            self.rows = _opened(settings, commit)  # of a stream that does not say, the first row tells its columns
            features = dict(self.rows.features or next(iter(self.rows), {}))
        self.columns = list(features)
        self.images = self._image_columns(features)
        self.label = self._optional(settings.label_column, "label")
        self.names: Sequence[str] = getattr(features.get(self.label or ""), "names", ())
        self.caption = caption_column(settings, self.columns) if captioned else None
        self.json = bool(shards) and (self._of(self.caption) or "").endswith(RECORDS)
        if shards:
            # Captions whether they are asked for now or not, or there would be two copies.
            texts = [
                column for column in (self.label, self._of(settings.caption_column) or usual(self.columns)) if column
            ]
            self.rows, self.images = _of_shards(settings, shards, texts), [IMAGE]
        else:
            taken = (*self.images, self.label, self._of(self.caption))
            self.rows = self._undecoded().select_columns(list(dict.fromkeys(c for c in taken if c)))
        most = settings.max_images
        if most is not None and not settings.streaming and most < len(self.rows):
            # Not the first: folders list images by class.
            self.rows = self.rows.select(np.sort(generator(0, "max_images").permutation(len(self.rows))[:most]))

    def __len__(self) -> int:
        """The number of rows; a stream has none."""
        return len(self.rows)

    def encoded(self, index: int) -> Encoded | None:
        """One image's file or bytes."""
        return self._encoded(self.rows[index])

    def _encoded(self, row: dict[str, Any]) -> Encoded | None:
        found = (_encoded(row[name]) for name in self.images)
        return next((image for image in found if image is not None), None)

    def _of(self, name: str | None) -> str | None:
        """The column that a name is in."""
        return None if name is None else holder(name, self.columns)

    def __iter__(self) -> Iterator[Row]:
        """The rows in order, up to `data.max_images`. Raises MachineError where a stream or a file breaks off."""
        return ((encoded, label) for encoded, label, _ in self.captioned())

    def captioned(self) -> Iterator[tuple[Encoded | None, Any, list[str]]]:
        """The same, each with its captions. Raises UserError for captions that are no text."""
        rows = islice(iter(self.rows), self.settings.max_images)
        for number in count():
            try:
                row = next(rows, None)
                encoded = self._encoded(row) if row else None
            except Exception as error:  # a dozen kinds of pyarrow, the hub and the file system
                reason = _reason(error)
                raise MachineError(f"data.path: {self.settings.path} breaks off ({reason}); try again") from None
            if row is None:
                return
            label = row[self.label] if self.label else None
            captions: list[str] = []
            if self.caption:
                path = f"{encoded.parent.name}/{encoded.name}" if isinstance(encoded, Path) else None
                captions = captions_in(row, self.caption, row.get(KEY) or path or f"number {number}", as_json=self.json)
            yield encoded, _number(label) if KEY in row else label, captions

    def _image_columns(self, features: dict[str, Any]) -> list[str]:
        """The column of the images; of shards the columns, one for each kind of file."""
        from datasets import Image

        named = self.settings.image_column
        found = [name for name, kind in features.items() if isinstance(kind, Image) or _is_image_struct(kind)]
        if named is not None:
            if named not in self.columns:
                raise UserError(f"data.image_column: {self._no_column(named)}")
            return [named]
        if "image" in self.columns:
            return ["image"]
        if not found:
            raise UserError(f"data.image_column: {self.settings.path} has none with images; {self._listed()}")
        if len(found) > 1 and self.settings.source != "webdataset":
            raise UserError(f"data.image_column: name one of {', '.join(found)}")
        return found

    def _optional(self, named: str | None, usual: str) -> str | None:
        if named is not None and named not in self.columns:
            raise UserError(f"data.{usual}_column: {self._no_column(named)}")
        return named or (usual if usual in self.columns else None)

    def _undecoded(self) -> Any:
        from datasets import Image

        if self.rows.features is None:  # nothing would decode them
            return self.rows
        # Bytes or paths, not pictures: a broken image is then ours to count, not an exception of the whole data set.
        rows = self.rows
        try:
            for name in self.images:
                rows = rows.cast_column(name, Image(decode=False))
            return rows
        except Exception as error:  # pyarrow's kinds
            problem = f"{self.images[0]!r} of {self.settings.path} holds no encoded images ({_reason(error)})"
            raise UserError(f"data.image_column: {problem}; {self._listed()}") from None

    def _no_column(self, name: str) -> str:
        return f"{self.settings.path} has no column {name!r}{nearest(name, self.columns)}; {self._listed()}"

    def _listed(self) -> str:
        return listing(self.columns)


def _opened(settings: DataSettings, commit: str | None) -> Any:
    import datasets

    _without_bars()
    try:
        if settings.source == "hub":
            return _on_hub(settings, commit)
        files = listed(settings)
        if settings.source == "folder" and not any(f.name in METADATA for f in files):
            return _in_folders(files)
        given: dict[str, Any] = {"data_files": {"train": _as_they_are(files)}}
        if settings.source == "parquet":
            _require_copy(files, datasets.load_dataset_builder("parquet", **given).cache_dir)
        return datasets.load_dataset(KINDS[settings.source], split="train", **given)
    except (UserError, MachineError):
        raise
    except Exception as error:  # a dozen kinds of pyarrow, the hub and the file system
        raise _unreadable(settings, error) from None


def _without_bars() -> None:
    import datasets

    if not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()


def _of_shards(settings: DataSettings, files: Sequence[Path], texts: Sequence[str]) -> Any:
    _without_bars()
    try:
        return rows_of(files, settings.image_column, texts)
    except (UserError, MachineError):
        raise
    except Exception as error:  # `datasets` wraps what is raised while it copies
        if isinstance(error.__cause__, UserError | MachineError):
            raise error.__cause__ from None
        raise _unreadable(settings, error) from None


def _unreadable(settings: DataSettings, error: Exception) -> UserError:
    reason = _reason(error.__cause__ or error)
    return UserError(f"data.path: {settings.path} cannot be read as {settings.source} ({reason})")


def _require_copy(files: Sequence[Path], copy: str) -> None:
    """Raises MachineError where the copy that `datasets` makes of files to read them by row does not fit the disk."""
    if not Path(copy).exists():
        require_space(Path(copy), sum(size_and_time(file)[0] for file in files))


def _on_hub(settings: DataSettings, commit: str | None) -> Any:
    import datasets

    assert settings.path is not None, "checked by the settings"
    if Path(settings.path).exists():  # `datasets` would take it, whatever the commit says
        raise UserError(f"data.path: {settings.path} is also a folder here; set data.source=folder, or run elsewhere")
    return datasets.load_dataset(
        settings.path, settings.subset, split=settings.split, revision=commit, streaming=settings.streaming
    )


def _in_folders(files: Sequence[Path]) -> Any:
    """Paths, and as labels the folders they lie in: where these are several, and all at one depth."""
    from datasets import ClassLabel, Dataset, Features, Value

    columns, features = {"image": [str(f) for f in files]}, Features({"image": Value("string")})
    names = sorted({f.parent.name for f in files})
    if len(names) > 1 and len({len(f.parts) for f in files}) == 1:
        columns["label"], features["label"] = [f.parent.name for f in files], ClassLabel(names=names)
    return Dataset.from_dict(columns, features=features)


def _as_they_are(files: Sequence[Path]) -> Any:
    """The files by name: plain strings would be taken for patterns, in which `[1]` means another file."""
    from datasets.data_files import DataFilesList

    return DataFilesList([str(f) for f in files], [tuple(map(str, size_and_time(f))) for f in files])


def _number(label: str | None) -> int | str | None:
    """A class as it is written in a member: a number where it is one."""
    text = None if label is None else label.strip()
    return int(text) if text and re.fullmatch(r"-?\d+", text) else text or None


def _is_image_struct(kind: Any) -> bool:
    return isinstance(kind, dict) and {"bytes", "path"} <= set(kind)


def _encoded(value: Any) -> Encoded | None:
    if isinstance(value, str):
        value = {"path": value}
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if data is None and path and "://" in path:  # a stream names files, in archives too, that lie elsewhere
            import fsspec  # type: ignore[import-untyped]

            with fsspec.open(path, "rb") as file:
                data = file.read()
        return data if data is not None else (Path(path) if path else None)
    return value if isinstance(value, bytes) else None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
