"""Which files a local source consists of, and the digest of their content, remembered by size and time. No torch."""

from __future__ import annotations

from pathlib import Path

from deme_diffusion.config import DataSettings
from deme_diffusion.digests import recall, remember, size_and_time
from deme_diffusion.errors import UserError
from deme_diffusion.files import canonical_digest, file_digest, visible_files

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
TABLES = {".parquet"}
SHARDS = {".tar"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def listed(settings: DataSettings) -> list[Path]:
    """The files of a folder, parquet or webdataset source, sorted. Raises UserError where there are none."""
    assert settings.path is not None, "checked by the settings"
    # Not resolved: a link's own name and folder tell its kind and label, wherever it points (as in the hub's cache).
    path, folder = Path(settings.path).expanduser().absolute(), settings.source == "folder"
    kinds, beside = (IMAGES, METADATA) if folder else (SHARDS if settings.source == "webdataset" else TABLES, ())
    kind = next(iter(kinds))  # the only one, but of images
    if not path.exists():
        raise UserError(f"data.path: no such file or folder: {path}")
    if path.is_file():
        if folder or path.suffix.lower() not in kinds:
            expected = "a folder of images" if folder else f"a {kind} file or a folder of them"
            raise UserError(f"data.path: {path} is not {expected}, which data.source={settings.source} takes")
        return [path]
    files = [f for f in visible_files(path) if f.suffix.lower() in kinds or f.name in beside]
    if all(f.name in beside for f in files):
        what = "images" if folder else f"{kind.removeprefix('.')} files"
        others = sorted({f.suffix for f in visible_files(path) if f.suffix})[:5]
        seen = f"; it holds {', '.join(others)}" if others else ""
        raise UserError(f"data.path: {path} has no {what} ({', '.join(sorted(kinds))}){seen}")
    return files


def content_digest(settings: DataSettings) -> str:
    """Digest of a local source's file names and contents.

    Hashing a large data set takes minutes, so it is remembered under the user's cache, keyed by every file's path, size
    and time of change.
    """
    files, root = listed(settings), Path(settings.path or "").expanduser().absolute()
    key = [(str(f), *size_and_time(f)) for f in files]
    if digest := recall(key):
        return digest
    digests = {f.relative_to(root).as_posix(): file_digest(f) if f.exists() else "broken link" for f in files}
    remember(key, digest := canonical_digest(digests), path=str(root), files=len(files))
    return digest
