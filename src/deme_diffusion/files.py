"""Files: digests, atomic writes, JSON lines, links; the operating system's refusals become one clear line."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from deme_diffusion.errors import MachineError

Record = dict[str, Any]
TEMPORARY = ".deme-tmp"
_EXPLAINED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def canonical_digest(value: object) -> str:
    """SHA-256 (hex) of canonical JSON: sorted keys, no spaces; ValueError on NaN and infinities."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, streamed."""
    digest = hashlib.sha256()
    with explained("read", path), path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def tree_digest(folder: Path, patterns: Sequence[str] = ("*",)) -> str:
    """Digest of the names and contents below `folder`; `*` in a pattern also spans `/`; hidden files do not count."""
    files = {path.relative_to(folder).as_posix(): path for path in visible_files(folder)}
    chosen = [rel for rel in files if any(fnmatchcase(rel, pattern) for pattern in patterns)]
    return canonical_digest({rel: file_digest(files[rel]) for rel in chosen})


def visible_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The visible files below `folder`, symlinks followed; a link to a folder that holds it is not entered again."""
    real = folder.resolve()
    for path in () if real in above else sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from visible_files(path, (*above, real))
        elif not path.name.startswith("."):
            yield path


@contextlib.contextmanager
def explained(verb: str, path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a MachineError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in _EXPLAINED:
            raise
        # Another file may be at fault, such as one that the block reads while it writes `path`.
        other = str(error.filename or path)
        where = "" if other == str(path) or TEMPORARY in other else f" ({other})"
        raise MachineError(f"cannot {verb} {path}: {os.strerror(error.errno)}{where}") from error


def _temporary(path: Path) -> Path:
    """A hidden name in the same folder: the replacement stays on one disk, and no digest sees it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well; otherwise what was there is kept."""
    temporary = _temporary(path)
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically; MachineError where the disk is full or closed to us."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically; ValueError on NaN and infinities, which are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_npy(path: Path, array: Any) -> None:
    """Replace the file by an array in NumPy's format."""
    import numpy as np

    with replacing(path) as file:
        np.save(file, array, allow_pickle=False)


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line; a line that a kill had cut short is dropped first, lest this one be glued to it."""
    if _ends_midline(path):
        truncate_jsonl(path, lambda _: True)
    # No fsync: it would cost milliseconds at every step, and a resume cuts the log back to its checkpoint anyway.
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(record)) + "\n")


def _ends_midline(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:  # missing or empty
        return False


def read_jsonl(path: Path) -> list[Record]:
    """The records, less a broken last line; none where there is no file; MachineError on a line broken elsewhere."""
    if not path.exists():
        return []
    lines, records = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise MachineError(f"{path}: line {number} is not a JSON object")
    return records


def truncate_jsonl(path: Path, keep: Callable[[Record], bool]) -> None:
    """Keep only the records that `keep` accepts, atomically, so that after a resume each step stands once."""
    if path.exists():
        write_text(path, "".join(json.dumps(record) + "\n" for record in read_jsonl(path) if keep(record)))


def part_of(pipeline: Path, name: str) -> Path:
    """The folder of a diffusers pipeline's part; early hub models (google/ddpm-*) hold all parts in one folder."""
    return pipeline / name if (pipeline / name).is_dir() else pipeline


def link(target: Path, at: Path) -> None:
    """Point `at` to `target` by a relative symlink, or by a text file `<at>.path` where there are no symlinks."""
    relative = os.path.relpath(target.resolve(), at.parent.resolve())
    temporary = _temporary(at)
    with explained("link", at):
        at.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.symlink_to(relative)
    except (OSError, NotImplementedError):
        write_text(at.with_name(f"{at.name}.path"), relative + "\n")
        return
    try:
        with explained("link", at):
            temporary.replace(at)
    finally:
        temporary.unlink(missing_ok=True)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise MachineError when the disk of `folder`, which need not exist yet, has fewer bytes free."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise MachineError(f"{folder} needs {needed_bytes / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free")
