"""Image files and tables made in code, and caches of their own for the tests that read them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deme_diffusion.config import DataSettings
from deme_diffusion.data.index import make_index
from deme_diffusion.data.sources import Pixels, SplitName
from deme_diffusion.data.splits import Split, load_splits

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def caches_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Send every cache that reading images may fill to a folder; `datasets` has read its variables by then."""
    import datasets

    for variable in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"):
        patch.setenv(variable, str(folder / variable))
    for constant in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        patch.setattr(datasets.config, constant, folder / "datasets")
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))


def noise(seed: int, count: int, *, height: int = 8, width: int = 8, channels: int = 3) -> list[Pixels]:
    """Different images (h, w, c)."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8))


def pil(pixels: Pixels) -> Any:
    """(h, w, 1 | 3 | 4) -> a grey, colour or transparent image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    (pil(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder: Path, files: Mapping[str, Pixels | bytes]) -> Path:
    """Image files by relative name; arrays become PNG files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else encoded(content))
    return folder


def numbered(images: Sequence[Pixels]) -> dict[str, Pixels | bytes]:
    """000.png, 001.png, ..."""
    return {f"{i:03}.png": image for i, image in enumerate(images)}


def write_parquet(
    file: Path, images: Sequence[Pixels | bytes | None], *, column: str = "img", rows: int = 1000, **others: Any
) -> Path:
    """The published layout: a struct of bytes and path; `rows` to a row group; other columns by name."""
    data = [encoded(image) if isinstance(image, np.ndarray) else image for image in images]
    cells = [None if item is None else {"bytes": item, "path": None} for item in data]
    columns = {column: pa.array(cells, STRUCT), **{name: pa.array(values) for name, values in others.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=rows)
    return file


def on(source: str, path: Path | str, **settings: Any) -> DataSettings:
    """Settings of a source."""
    return DataSettings.model_validate({"source": source, "path": str(path), **settings})


def splits_of(settings: DataSettings, folder: Path, *, limit: float = 1e9) -> dict[SplitName, Split]:
    """Index a source into a folder, and open its splits."""
    folder.mkdir(parents=True, exist_ok=True)
    make_index(settings, folder, commit=None, limit=limit)
    return load_splits(settings, folder)
