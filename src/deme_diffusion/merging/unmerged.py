"""What stays as it is beside the merged weights: the base's other parts, and the merged part's own small files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from deme_diffusion.files import explained, part_of, visible_files
from deme_diffusion.merging.checkpoints import MODEL_INDEX, parts
from deme_diffusion.weight_files import PICKLES

SMALL = 1 << 20
"""Bytes under which a file is never linked: configs get edited, and the base's must not change with them."""
BLOCK = 1 << 26
_WEIGHTS = (".safetensors", *PICKLES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf", ".npz", ".ot")
_INDEX = re.compile(r".*\.index(\.[\w-]+)?\.json")
_ITS_OWN = ("README.md", "merge.json", MODEL_INDEX)
"""What is said of the base, and would be wrong of the merged model."""


def copy_parts(pipeline: Path, component: str, out: Path, *, link: bool = False) -> None:
    """Every part of a pipeline but one, unchanged; parts that all lie in one folder get folders of their own.

    `link` shares big files with the base where the disk can; never a pickle, nor a file of the hub's cache.
    """
    with explained("write", out):
        for file, name in _pairs(pipeline, component):
            at = out / name
            at.parent.mkdir(parents=True, exist_ok=True)
            at.unlink(missing_ok=True)  # of an interrupted attempt; a link to the base's must not be written through
            if not (link and _linked(file.resolve(), at)):
                copy(file, at)


def copied_bytes(pipeline: Path, component: str, out: Path, *, link: bool = False) -> int:
    """Bytes that `copy_parts` writes to the disk of `out`, at most: a disk that shares blocks needs fewer."""
    above = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    files = [file.resolve() for file, _ in _pairs(pipeline, component)]
    shared = [link and _linkable(file) and file.stat().st_dev == above.stat().st_dev for file in files]
    return sum(file.stat().st_size for file, same in zip(files, shared, strict=True) if not same)


def copy_beside(component: Path, out: Path) -> None:
    """The files right beside a component's weights that are no weights: its config, and its code where it has any."""
    flat = (component / MODEL_INDEX).is_file()  # an early hub model: the other parts' files lie there too
    for file in sorted(component.iterdir()):
        mine = file.name == "config.json" if flat else file.name not in _ITS_OWN and not file.name.startswith(".")
        if mine and file.is_file() and file.suffix not in _WEIGHTS and not _INDEX.fullmatch(file.name):
            copy(file, out / file.name)


def copy(file: Path, at: Path) -> None:
    """A copy on the disk, whose bytes are its own; a disk that can share blocks until one is written to does so."""
    with file.open("rb") as source, at.open("wb") as target:
        if not _in_kernel(source, target):
            shutil.copyfileobj(source, target, BLOCK)
        target.flush()
        os.fsync(target.fileno())


def _in_kernel(source: BinaryIO, target: BinaryIO) -> bool:
    """Whether the system copied all of it; otherwise nothing is copied, and both files are at their start."""
    size, copied = os.fstat(source.fileno()).st_size, 0
    if not hasattr(os, "copy_file_range"):  # only Linux has it
        return False
    try:
        while copied < size and (count := os.copy_file_range(source.fileno(), target.fileno(), size - copied)):
            copied += count
    except OSError:  # two disks, or one that cannot: what is really wrong the other way meets too
        copied = -1
    if copied == size:
        return True
    source.seek(0)
    target.seek(0)
    target.truncate()
    return False


def _pairs(pipeline: Path, component: str) -> Iterator[tuple[Path, Path]]:
    """Each file of the other parts, and its name in the new pipeline."""
    for part in parts(pipeline):
        if part == component:
            continue
        if (folder := part_of(pipeline, part)) != pipeline:
            yield from ((file, Path(part) / file.relative_to(folder)) for file in visible_files(folder))
        elif (config := pipeline / f"{part}_config.json").is_file():
            yield config, Path(part) / config.name
    yield pipeline / MODEL_INDEX, Path(MODEL_INDEX)


def _linkable(real: Path) -> bool:
    hub = any(part == "blobs" or part.startswith("models--") for part in real.parts)
    return real.stat().st_size >= SMALL and real.suffix not in PICKLES and not hub


def _linked(real: Path, at: Path) -> bool:
    if not _linkable(real):
        return False
    try:
        os.link(real, at)
    except OSError:  # another disk, or one without links
        return False
    return True
