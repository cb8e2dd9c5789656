"""Digests that need no reading: from an artefact's manifest, or from a memory under the user's cache. No torch.

Hashing 3.4 GB takes longer than merging it, so a file is hashed only where that is asked for, and then remembered by
its path, size and time of change.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deme_diffusion.artefacts import MANIFEST
from deme_diffusion.errors import MachineError
from deme_diffusion.files import canonical_digest, file_digest, write_json

How = Literal["manifest", "hub", "cache", "hashed", "none"]
_ORDER: tuple[How, ...] = ("manifest", "hub", "cache", "hashed", "none")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Known:
    """What is known of some files' content: sha256 (hex) or None, how that is known, and their size.

    One file: its own sha256, which the hub shows too. Several: the digest of their names and sha256s.
    """

    digest: str | None
    how: How
    bytes: int


def known(files: Sequence[Path], *, full_hash: bool = False) -> Known:
    """The digest of a model's files without reading them; `full_hash` reads those that nothing vouches for."""
    found = {file.name: _of_file(file, full_hash) for file in files}
    # Said as the weakest of the ways: a digest that was read from disk in part is one that was read.
    how: How = max((way for _, way in found.values()), key=_ORDER.index, default="none")
    digests = {name: digest for name, (digest, _) in found.items()}
    size = sum(size_and_time(file)[0] for file in files)
    if how == "none":
        return Known(None, how, size)
    return Known(next(iter(digests.values())) if len(digests) == 1 else canonical_digest(digests), how, size)


def _of_file(file: Path, full_hash: bool) -> tuple[str | None, How]:
    if digest := _by_manifest(file):
        return digest, "manifest"
    if (blob := file.resolve()).parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name, "hub"  # whose cache names a big file by its sha256, and a small one by another digest
    key = ["file", str(file.absolute()), *size_and_time(file)]
    if digest := recall(key):
        return digest, "cache"
    if not full_hash:
        return None, "none"
    remember(key, digest := file_digest(file), path=str(file.absolute()))
    return digest, "hashed"


def _by_manifest(file: Path) -> str | None:
    """What the manifest of the artefact that holds the file says, if size and time of change are still its own."""
    file = file.absolute()
    for folder in file.parents:
        if not (folder / MANIFEST).is_file():
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads((folder / MANIFEST).read_bytes())["files"][file.relative_to(folder).as_posix()]
            if size_and_time(file) == (entry["size"], entry["mtime_ns"]):
                return str(entry["sha256"])
    return None


def hub_snapshot(path: Path) -> dict[str, str]:
    """`repo` and `commit` of what lies in a snapshot of the hub's cache; empty elsewhere."""
    folders = path.absolute().parts
    for holder, above, commit in zip(folders, folders[1:], folders[2:], strict=False):
        if holder.startswith("models--") and above == "snapshots":
            return {"repo": holder.removeprefix("models--").replace("--", "/"), "commit": commit}
    return {}


def artefact_of(path: Path) -> str | None:
    """The digest of the key of the artefact that a file or folder lies in; None where it lies in none."""
    path = path.resolve()
    for folder in (path, *path.parents):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads((folder / MANIFEST).read_bytes())["digest"])
    return None


def size_and_time(file: Path) -> tuple[int, int]:
    """By what a change of a file is noticed: bytes, and nanoseconds; zeros for a broken link."""
    if not file.exists():
        return 0, 0
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def recall(key: object) -> str | None:
    """The digest that was remembered under a key, which names all that it depends on."""
    try:
        return str(json.loads(_memory(key).read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(key: object, digest: str, **told: Any) -> None:
    """Keep a digest for `recall`, with what a reader of the file may want to know."""
    with suppress(MachineError, OSError):  # a home that cannot be written to costs time, not the run
        write_json(_memory(key), {"digest": digest, **told})


def _memory(key: object) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "deme-diffusion" / "digests" / f"{canonical_digest(key)[:32]}.json"
