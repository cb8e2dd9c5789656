"""The reading side of a merge: slices of the base's and the experts' files, in buffers that are used again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch

from deme_diffusion.errors import MachineError
from deme_diffusion.files import expect, forget
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.threads import Line
from deme_diffusion.merging.vectors import slices
from deme_diffusion.weights import Entry, Header, Weights, stored_order, tensor_bytes


@dataclass(frozen=True)
class Piece:
    """One step of a merge: the entries `at` of a parameter, or all of it where it must be merged as a whole."""

    key: str
    at: slice | None


@dataclass(frozen=True)
class Filled:
    """A buffer with the slices of base and experts; None, where a whole tensor is read through its memory map."""

    buffers: list[torch.Tensor] | None
    parts: list[torch.Tensor]


def pieces(merger: Merger, header: Header, entries: int) -> Iterator[Piece]:
    """The steps of a file's parameters, in the order in which it holds them."""
    for key in stored_order(header):
        size = prod(header[key][1])
        if size and merger.sliced(key):
            yield from (Piece(key, at) for at in slices(size, entries))
        else:
            yield Piece(key, None)


def buffers(merger: Merger, entries: int) -> list[torch.Tensor]:
    """Room for a slice of `entries` of base and experts."""
    readers = (merger.base, *merger.experts)
    keys = merger.keys()
    widest = [max((reader.dtype(key).itemsize for key in keys), default=1) for reader in readers]
    return [torch.empty(entries * width, dtype=torch.uint8) for width in widest]


def read(merger: Merger, work: Sequence[Piece], empty: Line[list[torch.Tensor]], ready: Line[Filled]) -> None:
    """Fill buffers with the slices of base and experts, step by step."""
    readers = (merger.base, *merger.experts)
    sizes = sum(file.stat().st_size for reader in readers for file in reader.files)
    floods = sizes > _memory() / 4  # pages that nobody will ask for again would drive out others'
    with ExitStack() as stack:
        files = {f: stack.enter_context(f.open("rb", buffering=0)) for reader in readers for f in reader.files}
        for ahead, piece in enumerate(work):
            if ahead + 1 < len(work):
                _expect(files, readers, work[ahead + 1])
            if piece.at is None:
                ready.put(Filled(None, []))
                continue
            room = empty.get()
            parts = [_fill(files, reader, piece, own, floods) for reader, own in zip(readers, room, strict=True)]
            ready.put(Filled(room, parts))


def _expect(files: Mapping[Path, FileIO], readers: Sequence[Weights], piece: Piece) -> None:
    for reader in readers:
        entry = reader.entry(piece.key)
        first, size = _range(entry, reader.dtype(piece.key).itemsize, piece.at)
        expect(files[entry.file], first, size)


def _fill(
    files: Mapping[Path, FileIO], reader: Weights, piece: Piece, buffer: torch.Tensor, floods: bool
) -> torch.Tensor:
    entry, dtype = reader.entry(piece.key), reader.dtype(piece.key)
    first, size = _range(entry, dtype.itemsize, piece.at)
    file, view, got = files[entry.file], tensor_bytes(buffer[:size]), 0
    file.seek(first)
    while got < size:
        if not (count := file.readinto(view[got:])):
            raise MachineError(f"{entry.file}: became shorter while it was read")
        got += count
    if floods:
        forget(file, first, size)
    return buffer[:size].view(dtype)


def _range(entry: Entry, itemsize: int, at: slice | None) -> tuple[int, int]:
    """First byte and bytes of a piece in its file."""
    if at is None:
        return entry.start, entry.nbytes
    return entry.start + at.start * itemsize, (at.stop - at.start) * itemsize


def _memory() -> float:
    """Bytes of this machine."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
