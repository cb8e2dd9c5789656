"""Files: digests, atomic writes, JSON lines, links; the operating system's refusals become one clear line."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from deme_diffusion.errors import MachineError, UserError

Record = dict[str, Any]
TEMPORARY = ".deme-tmp"
_HIDDEN = re.compile(rf"\.(.+){re.escape(TEMPORARY)}")
_EXPLAINED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EBUSY}


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
        if error.errno not in _EXPLAINED and TEMPORARY not in str(error.filename):
            raise
        # Another file may be at fault, such as one that the block reads while it writes `path`.
        other = str(error.filename or path)
        where = "" if other == str(path) or TEMPORARY in other else f" ({other})"
        raise MachineError(f"cannot {verb} {_final(path)}: {error.strerror}{where}") from error


def _final(path: Path) -> Path:
    """The name that a hidden folder on the way is going to have."""
    return Path(*(_HIDDEN.sub(r"\1", part) for part in path.parts))


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


@contextlib.contextmanager
def building(out: Path, *, chosen: str | None = None) -> Iterator[Path]:
    """A new hidden folder that becomes `out` when the block ends well; otherwise nothing stays.

    `out` must not exist, or be an empty folder. With `chosen` that file in the folder becomes `out`, and its siblings
    are put next to it, named after it. What a killed process left of the same target is removed; MachineError while
    another one is at work on it.
    """
    hidden = out.with_name(f".{out.name}{TEMPORARY}")
    with explained("write", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(hidden, out):
            try:
                yield hidden
                if chosen is None:
                    _become(hidden, out)  # from here on the hidden name may be another process's
                    return
                siblings = [made for made in hidden.iterdir() if made.name != chosen]
                with contextlib.ExitStack() as undo:  # the siblings first: where the model stands, all of it does
                    for made in siblings:
                        _become(made, at := out.with_name(f"{out.stem}.{made.name}"))
                        undo.callback(at.unlink, missing_ok=True)
                    _become(hidden / chosen, out)
                    undo.pop_all()
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise
            hidden.rmdir()


def _become(made: Path, out: Path) -> None:
    try:
        sync_folder(made if made.is_dir() else made.parent)
        if made.is_file() and out.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        made.replace(out)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise UserError(f"{out}: somebody else has made it in the meantime; give a name that is free") from None
    sync_folder(out.parent)


@contextlib.contextmanager
def _alone(hidden: Path, out: Path) -> Iterator[None]:
    """The folder made, empty, and locked: the lock goes with the process, and with the folder when it is renamed."""
    busy = MachineError(f"cannot write {out}: another process is at work on it ({hidden}); wait until it has finished")
    for _ in range(10):
        hidden.mkdir(exist_ok=True)
        with _locked(hidden) as ours:
            if ours is None:
                raise busy
            if ours:
                for left in hidden.iterdir():
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
                yield
                return
    raise busy


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Whether the folder is ours now; None while another process holds it, False where it was moved away."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there a folder that stands is taken for a killed process's
        yield True
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    held: bool | None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
    except BlockingIOError:
        held = None
    except OSError:  # a disk without locks
        held = True
    try:
        yield held
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where a folder can be synced."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def expect(file: FileIO, start: int, size: int) -> None:
    """Tell the system that these bytes are read soon; a hint, where there is such a thing."""
    if size and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)


def forget(file: FileIO | BinaryIO, start: int, size: int) -> None:
    """Tell the system to write these bytes to the disk now, and that nobody reads those that are on it; a hint."""
    if size and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise MachineError when the disk of `folder`, which need not exist yet, has fewer bytes free."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        needed, left = needed_bytes / 1e9, free / 1e9
        raise MachineError(f"{_final(folder)} needs {needed:.2f} GB, and its disk has {left:.2f} GB free")
