"""Encoded images of a folder, parquet files, tar shards or a hub data set, by `datasets`; nothing is decoded here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deme_diffusion.config import DataSettings
from deme_diffusion.data.captions import caption_column, captions_in
from deme_diffusion.data.contents import METADATA, listed
from deme_diffusion.data.prepare import Encoded
from deme_diffusion.data.shards import columns_of, undecodable
from deme_diffusion.digests import size_and_time
from deme_diffusion.errors import MachineError, UserError, nearest
from deme_diffusion.rng import generator

KINDS = {"folder": "imagefolder", "parquet": "parquet", "webdataset": "webdataset"}
"""Source -> what `datasets` calls it."""
Row = tuple[Encoded | None, Any]
"""An encoded image (None where the column is empty) and its label, None where there is none."""


class Table:
    """The rows of a data set with their columns found. Raises UserError: nothing there, no such column, no images.

    `captioned`: with their captions, which are looked for only then.
    """

    def __init__(self, settings: DataSettings, commit: str | None = None, *, captioned: bool = False) -> None:
        self.settings = settings
        self.rows = _opened(settings, commit)
        features = dict(self.rows.features or {})
        if not features:  # a stream that does not say: its first row does
            features = dict(next(iter(self.rows), {}))
        self.columns = list(features)
        self.images = self._image_columns(features)
        self.label = self._optional(settings.label_column, "label")
        self.caption = caption_column(settings, self.columns) if captioned else None
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
        """The column that a name is in, as `json` of `json.caption`."""
        return name if name is None or name in self.columns else name.split(".")[0]

    def __iter__(self) -> Iterator[Row]:
        """The rows in order, up to `data.max_images`. Raises MachineError where a stream or a file breaks off."""
        return ((encoded, label) for encoded, label, _ in self.captioned())

    def captioned(self) -> Iterator[tuple[Encoded | None, Any, list[str]]]:
        """The same, each with its captions. Raises UserError for captions that are no text."""
        rows = islice(iter(self.rows), self.settings.max_images)
        while True:
            try:
                row = next(rows, None)
                encoded = self._encoded(row) if row else None
            except Exception as error:  # a dozen kinds of pyarrow, the hub and the file system
                reason = _reason(error)
                raise MachineError(f"data.path: {self.settings.path} breaks off ({reason}); try again") from None
            if row is None:
                return
            yield (
                encoded,
                row[self.label] if self.label else None,
                captions_in(row, self.caption) if self.caption else [],
            )

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
        return f"its columns: {', '.join(self.columns)}"


def _opened(settings: DataSettings, commit: str | None) -> Any:
    import datasets

    if not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
    try:
        if settings.source == "hub":
            return _on_hub(settings, commit)
        files = listed(settings)
        if settings.source == "folder" and not any(f.name in METADATA for f in files):
            return datasets.Dataset.from_dict(_columns(files))
        options = {"features": columns_of(files)} if settings.source == "webdataset" else {}
        given = {"train": _as_they_are(files)}
        return datasets.load_dataset(KINDS[settings.source], data_files=given, split="train", **options)
    except UserError:
        raise
    except Exception as error:  # a dozen kinds of pyarrow, the hub and the file system
        cause = error.__cause__ or error
        where = undecodable(files) if settings.source == "webdataset" and isinstance(cause, UnicodeError) else ""
        raise UserError(
            f"data.path: {settings.path} cannot be read as {settings.source} ({_reason(cause)}){where}"
        ) from None


def _on_hub(settings: DataSettings, commit: str | None) -> Any:
    import datasets

    assert settings.path is not None, "checked by the settings"
    if Path(settings.path).exists():  # `datasets` would take it, whatever the commit says
        raise UserError(f"data.path: {settings.path} is also a folder here; set data.source=folder, or run elsewhere")
    return datasets.load_dataset(
        settings.path, settings.subset, split=settings.split, revision=commit, streaming=settings.streaming
    )


def _columns(files: Sequence[Path]) -> dict[str, list[Any]]:
    """Paths, and as labels the folders they lie in: where these are several, and all at one depth."""
    columns: dict[str, list[Any]] = {"image": [str(f) for f in files]}
    names = sorted({f.parent.name for f in files})
    if len(names) > 1 and len({len(f.parts) for f in files}) == 1:
        number = {name: i for i, name in enumerate(names)}
        columns["label"] = [number[f.parent.name] for f in files]
    return columns


def _as_they_are(files: Sequence[Path]) -> Any:
    """The files by name: plain strings would be taken for patterns, in which `[1]` means another file."""
    from datasets.data_files import DataFilesList

    return DataFilesList([str(f) for f in files], [tuple(map(str, size_and_time(f))) for f in files])


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
