"""Artefacts: the store that all runs share, manifests, locks and provenance."""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from deme_diffusion.errors import MachineError
from deme_diffusion.files import TEMPORARY, Record, canonical_digest, explained, file_digest, visible_files, write_json
from deme_diffusion.provenance import provenance

logger = logging.getLogger(__name__)
MANIFEST, WORK = "manifest.json", "work"  # checkpoints live in work, which goes when the artefact is finished


@dataclass(frozen=True)
class Key:
    """What decides a stage's result: `settings` are the non-default ones, `inputs` maps a name to a digest."""

    stage: str
    version: int
    settings: Mapping[str, object]
    inputs: Mapping[str, str]
    seed: int | None

    @property
    def digest(self) -> str:
        """The first 16 hex characters of the canonical digest."""
        return canonical_digest(self.as_dict())[:16]

    def as_dict(self) -> Record:
        """The five fields as plain JSON."""
        return {**vars(self), "settings": dict(self.settings), "inputs": dict(self.inputs)}


@dataclass(frozen=True)
class Artefact:
    """What a finished stage left: `digest` of its key, `results` it returned, `seconds` over all attempts."""

    folder: Path
    manifest: Record

    @property
    def digest(self) -> str:
        """The digest of its key."""
        return str(self.manifest["digest"])

    @property
    def results(self) -> Record:
        """What its stage returned."""
        return dict(self.manifest["results"])

    @property
    def seconds(self) -> float:
        """Wall-clock time, interrupted attempts included."""
        return float(self.manifest["seconds"])

    def path(self, name: str) -> Path:
        """A file or folder of it."""
        return self.folder / name


class _Fault(Exception):
    """A manifest does not hold: which file, and why."""


class Store:
    """The artefacts of all runs, at root/<stage>/<digest>."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, key: Key) -> Path:
        """Where the artefact lives, made or not."""
        return self.root / key.stage / key.digest

    def find(self, key: Key) -> Artefact | None:
        """The finished artefact; one that does not hold is logged and emptied, so that it is made again."""
        folder = self.folder(key)
        with contextlib.suppress(_Fault):
            return _load(folder, key)
        with try_lock(folder) as ours:  # whoever else holds it is already making it again
            if not ours:
                return None
            try:
                return _load(folder, key)
            except _Fault as fault:
                logger.warning("%s %s: %s; it will be made again", key.stage, key.digest, fault)
                empty(folder)
        return None

    def status(self, key: Key) -> Literal["done", "partial", "missing"]:
        """The state at a glance: nothing is hashed, raised, deleted or waited for."""
        if self.glimpse(key) is not None:
            return "done"
        return "partial" if os.path.isdir(self.folder(key)) else "missing"  # noqa: PTH112 (Path.is_dir raises on EACCES)

    def glimpse(self, key: Key) -> Artefact | None:
        """The artefact that `status` calls done."""
        folder = self.folder(key)
        with contextlib.suppress(_Fault, OSError):
            if manifest := _read_manifest(folder, key, hashing=False):
                return Artefact(folder, manifest)
        return None

    @contextlib.contextmanager
    def lock(self, key: Key, timeout: float = -1) -> Iterator[None]:
        """Hold the key's lock; `timeout` in seconds, negative waits for ever; MachineError when it has passed."""
        with try_lock(self.folder(key)) as ours:
            if ours:
                yield
                return
        logger.info("waiting for another process that makes %s %s", key.stage, key.digest)
        with try_lock(self.folder(key), timeout) as ours:
            if not ours:
                raise MachineError(f"{key.stage} {key.digest} is still locked after {timeout:g} s")
            yield

    def produce(self, key: Key, make: Callable[[Path], Mapping[str, object] | None]) -> Artefact:
        """Find the artefact, or let `make` fill its folder (resuming from what is there) and seal it."""
        with self.lock(key):
            if (done := self.find(key)) is not None:
                return done
            folder = self.folder(key)
            with _stopwatch(folder / WORK / "seconds.json"):
                results = make(folder)
            return _seal(folder, key, dict(results or {}))


class Onlooker(Store):
    """A store that others are at work in: found is what is there at a glance, and nothing is locked or mended."""

    def find(self, key: Key) -> Artefact | None:
        """The finished artefact, unhashed."""
        return self.glimpse(key)

    def is_held(self, key: Key) -> bool:
        """Whether somebody has the key's lock now: without taking it, as far as the system lets one look."""
        try:
            import fcntl

            file = os.open(_lock_file(self.folder(key)), os.O_RDONLY)
        except (ImportError, OSError):  # on Windows nobody can look; no file: nobody was ever at work
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a disk without locks
            return False
        finally:
            os.close(file)
        return False


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


@contextlib.contextmanager
def try_lock(folder: Path, timeout: float = 0) -> Iterator[bool]:
    """Hold the lock of an artefact's folder, if it can be had within so many seconds; whether it is held."""
    path = _lock_file(folder)
    with explained("lock", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, is_singleton=True)  # one object a path, so that find() may lock within produce()
        try:
            lock.acquire(timeout=timeout)
            ours = True
        except Timeout:
            ours = False
    try:
        yield ours
    finally:
        if ours:
            lock.release()  # the file stays: who deletes a lock file lets two waiters hold "the" lock


def _read_manifest(folder: Path, key: Key, hashing: bool) -> Record | None:
    """The manifest, None where there is none, _Fault where it does not hold."""
    try:
        manifest: Record = json.loads((folder / MANIFEST).read_bytes())
        files = {rel: (int(e["size"]), int(e["mtime_ns"]), e["sha256"]) for rel, e in manifest["files"].items()}
        owner = (manifest["stage"], manifest["digest"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Fault(f"{MANIFEST} is not a manifest") from None
    if owner != (key.stage, key.digest):
        raise _Fault(f"{MANIFEST} belongs to {owner[0]} {owner[1]}")
    for rel, expected in files.items():
        manifest["files"][rel]["mtime_ns"] = _check(folder, rel, *expected, hashing)
    return manifest


def _check(folder: Path, rel: str, size: int, mtime_ns: int, sha256: str, hashing: bool) -> int:
    """The file's mtime in ns; _Fault unless the file is the manifest's."""
    try:
        found = (folder / rel).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise _Fault(f"{rel} is missing") from None
    if found.st_size != size:
        raise _Fault(f"{rel} has {found.st_size} bytes instead of {size}")
    # Hashing gigabytes at every run is too slow: an untouched mtime vouches for the contents.
    if hashing and found.st_mtime_ns != mtime_ns and file_digest(folder / rel) != sha256:
        raise _Fault(f"{rel} has another checksum")
    return found.st_mtime_ns


def _load(folder: Path, key: Key) -> Artefact | None:
    with explained("read", folder):
        manifest = _read_manifest(folder, key, hashing=True)
    if manifest is None:
        return None
    with contextlib.suppress(MachineError, OSError, ValueError):  # spares a store that was copied the next hashing
        if manifest != json.loads((folder / MANIFEST).read_bytes()):
            write_json(folder / MANIFEST, manifest)
    return Artefact(folder, manifest)


def _seal(folder: Path, key: Key, results: Record) -> Artefact:
    for stale in folder.rglob(f".*{TEMPORARY}"):
        stale.unlink()  # of an attempt that was killed: we hold the lock, so nobody is writing it
    paths = {path.relative_to(folder): path for path in visible_files(folder)}
    paths = {rel: path for rel, path in paths.items() if rel.parts[0] not in (MANIFEST, WORK)}
    manifest = {
        **key.as_dict(),
        "digest": key.digest,
        "files": {rel.as_posix(): _entry(path) for rel, path in paths.items()},
        "results": results,
        "seconds": _read_seconds(folder / WORK / "seconds.json"),
        "provenance": provenance(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    manifest = json.loads(json.dumps(manifest, allow_nan=False))
    # The checkpoints go last: results that are not JSON, a full disk or a kill must not cost the training.
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return Artefact(folder, manifest)


def _entry(path: Path) -> Record:
    """A file's line in the manifest, which vouches for it after a power cut too: hence the fsync."""
    with explained("seal", path), path.open("rb") as file:
        os.fsync(file.fileno())
        stat = os.fstat(file.fileno())
    return {"size": stat.st_size, "sha256": file_digest(path), "mtime_ns": stat.st_mtime_ns}


@contextlib.contextmanager
def _stopwatch(path: Path) -> Iterator[None]:
    """Add the block's seconds to those in `path`, however the block ends."""
    write_json(path, {"seconds": (before := _read_seconds(path))})
    start = time.monotonic()
    try:
        yield
    finally:
        with contextlib.suppress(MachineError, OSError):  # must not hide why the block ended
            write_json(path, {"seconds": before + time.monotonic() - start})


def _read_seconds(path: Path) -> float:
    try:
        return float(json.loads(path.read_bytes())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def empty(folder: Path) -> None:
    """Take away all that is in an artefact's folder, the manifest first; its lock is to be held."""
    with explained("empty", folder):
        (folder / MANIFEST).unlink(missing_ok=True)  # first: half a deletion must not look finished
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
