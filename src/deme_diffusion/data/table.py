"""Encoded images of a folder, of parquet files or of a hub data set, by way of `datasets`; nothing is decoded here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deme_diffusion.config import DataSettings
from deme_diffusion.data.contents import METADATA, listed
from deme_diffusion.data.prepare import Encoded
from deme_diffusion.digests import size_and_time
from deme_diffusion.errors import MachineError, UserError, nearest
from deme_diffusion.rng import generator

Row = tuple[Encoded | None, Any]
"""An encoded image (None where the column is empty) and its label, None where there is none."""


class Table:
    """The rows of a data set with their columns found. Raises UserError: nothing there, no such column, no images."""

    def __init__(self, settings: DataSettings, commit: str | None = None) -> None:
        self.settings = settings
        self.rows = _opened(settings, commit)
        features = dict(self.rows.features or {})
        if not features:  # a stream that does not say: its first row does
            features = dict(next(iter(self.rows), {}))
        self.columns = list(features)
        self.image = self._image_column(features)
        self.label = self._optional(settings.label_column, "label")
        self.rows = self._undecoded().select_columns([c for c in (self.image, self.label) if c])
        most = settings.max_images
        if most is not None and not settings.streaming and most < len(self.rows):
            # Not the first: folders list images by class.
            self.rows = self.rows.select(np.sort(generator(0, "max_images").permutation(len(self.rows))[:most]))

    def __len__(self) -> int:
        """The number of rows; a stream has none."""
        return len(self.rows)

    def encoded(self, index: int) -> Encoded | None:
        """One image's file or bytes."""
        return _encoded(self.rows[index][self.image])

    def __iter__(self) -> Iterator[Row]:
        """The rows in order, up to `data.max_images`. Raises MachineError where a stream or a file breaks off."""
        rows = islice(iter(self.rows), self.settings.max_images)
        while True:
            try:
                row = next(rows, None)
                encoded = _encoded(row[self.image]) if row else None
            except Exception as error:  # a dozen kinds of pyarrow, the hub and the file system
                reason = _reason(error)
                raise MachineError(f"data.path: {self.settings.path} breaks off ({reason}); try again") from None
            if row is None:
                return
            yield encoded, row[self.label] if self.label else None

    def _image_column(self, features: dict[str, Any]) -> str:
        from datasets import Image

        named = self.settings.image_column
        found = [name for name, kind in features.items() if isinstance(kind, Image) or _is_image_struct(kind)]
        if named is not None:
            if named not in self.columns:
                raise UserError(f"data.image_column: {self._no_column(named)}")
            return named
        if "image" in self.columns:
            return "image"
        if not found:
            raise UserError(f"data.image_column: {self.settings.path} has none with images; {self._listed()}")
        if len(found) > 1:
            raise UserError(f"data.image_column: name one of {', '.join(found)}")
        return found[0]

    def _optional(self, named: str | None, usual: str) -> str | None:
        if named is not None and named not in self.columns:
            raise UserError(f"data.{usual}_column: {self._no_column(named)}")
        return named or (usual if usual in self.columns else None)

    def _undecoded(self) -> Any:
        from datasets import Image

        if self.rows.features is None:  # nothing would decode them
            return self.rows
        # Bytes or paths, not pictures: a broken image is then ours to count, not an exception of the whole data set.
        try:
            return self.rows.cast_column(self.image, Image(decode=False))
        except Exception as error:  # pyarrow's kinds
            problem = f"{self.image!r} of {self.settings.path} holds no encoded images ({_reason(error)})"
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
        kind = "imagefolder" if settings.source == "folder" else "parquet"
        return datasets.load_dataset(kind, data_files={"train": _as_they_are(files)}, split="train")
    except UserError:
        raise
    except Exception as error:  # a dozen kinds of pyarrow, the hub and the file system
        problem = f"{settings.path} cannot be read as {settings.source} ({_reason(error.__cause__ or error)})"
        raise UserError(f"data.path: {problem}") from None


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
