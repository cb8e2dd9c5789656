"""The fast path of a merge: while one slice is merged, the next ones are read and the last ones written.

A reader thread fills a few buffers from the N + 1 files, the caller's thread computes, a writer thread writes. Methods
that merge entry by entry get slices, so that memory does not grow with a tensor; the others get memory-mapped tensors.
The bits depend neither on the slices' size nor on the threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from deme_diffusion.errors import MachineError
from deme_diffusion.files import expect, forget
from deme_diffusion.merging.apply import Merger, computable
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.threads import Line, Worker, running
from deme_diffusion.merging.vectors import slices, wide
from deme_diffusion.weights import Entry, Header, Weights, stored_order, stream_to, tensor_bytes

SLICE = 1 << 17
"""Entries of a slice: N + 1 of them stay in a processor's cache, and a read is still long enough for any disk."""
DEPTH, BEHIND = 3, 1 << 24
"""Slices between two threads; bytes after which a written file's pages are handed to the disk."""


class Observer(Protocol):
    """Somebody who looks on while a merge streams."""

    def see(self, key: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        """Flat slices of one parameter (or all of it) in float32 or wider; each entry comes exactly once."""


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


def stream(
    merger: Merger,
    weights: MergeWeights,
    files: Mapping[Path, Header],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    observe: Observer | None = None,
    entries: int = SLICE,
) -> None:
    """Merge into safetensors files, of which each stands under its name once it is whole.

    Raises what any of the three threads raises; whatever happens, they have ended when this returns.
    """
    work = [piece for header in files.values() for piece in _pieces(merger, header, entries)]
    ready, empty = Line[Filled](DEPTH), Line[list[torch.Tensor]](DEPTH)
    done = Line[tuple[str, torch.Tensor]](DEPTH if merger.row.pointwise else 1)  # whole tensors are big
    for _ in range(DEPTH if any(piece.at for piece in work) else 0):
        empty.put(_buffers(merger, entries))
    lines = (ready, empty, done)
    reader = Worker(lambda: _read(merger, work, empty, ready), lines)
    writer = Worker(lambda: _write(files, metadata, done), lines)
    equal = [not matrices for matrices in merger.matrices]
    with running(reader, writer), _one_thread(merger.row.pointwise):
        for piece in work:
            filled = ready.get()
            parts = filled.parts or [reader.tensor(piece.key) for reader in (merger.base, *merger.experts)]
            _compare(equal, parts)
            if observe is not None:
                _show(observe, piece.key, parts)
            done.put((piece.key, _merged(merger, weights, piece, filled, dtype)))
            if filled.buffers is not None:
                empty.put(filled.buffers)
        writer.join()
    if observe is not None:
        for name, zeros, matrices in merger.projections():
            _show(observe, name, [zeros, *matrices])
    merger.note_equal(equal)


def _pieces(merger: Merger, header: Header, entries: int) -> Iterator[Piece]:
    """In the order in which the file holds them."""
    for key in stored_order(header):
        size = prod(header[key][1])
        if size and merger.sliced(key):
            yield from (Piece(key, at) for at in slices(size, entries))
        else:
            yield Piece(key, None)


def _merged(
    merger: Merger, weights: MergeWeights, piece: Piece, filled: Filled, dtype: torch.dtype | None
) -> torch.Tensor:
    if piece.at is None:
        return merger.tensor(piece.key, weights, dtype)
    base, *experts = filled.parts
    merged = merger.finished(piece.key, merger.part(piece.key, weights, base, experts, piece.at), dtype)
    inside = any(merged.untyped_storage().data_ptr() == part.untyped_storage().data_ptr() for part in filled.parts)
    return merged.clone() if inside else merged  # the buffer is filled again while this is written


def _compare(equal: list[bool], parts: Sequence[torch.Tensor]) -> None:
    """Which experts have been the base so far."""
    base, *experts = parts
    for i, expert in enumerate(experts):
        if equal[i]:
            one, other = computable(base), computable(expert)
            dtype = torch.promote_types(one.dtype, other.dtype)
            equal[i] = torch.equal(one.to(dtype), other.to(dtype))


def _show(observe: Observer, key: str, parts: Sequence[torch.Tensor]) -> None:
    if parts[0].is_floating_point():
        flat = [part.reshape(-1) for part in parts]
        for at in slices(flat[0].numel(), SLICE):
            base, *experts = (wide(computable(part[at])) for part in flat)
            observe.see(key, base, experts)


# -- the threads -----------------------------------------------------------------------------------


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Three threads of ours are at work on slices: torch's own would only be in their way."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- reading ---------------------------------------------------------------------------------------


def _buffers(merger: Merger, entries: int) -> list[torch.Tensor]:
    readers = (merger.base, *merger.experts)
    keys = merger.keys()
    widest = [max((reader.dtype(key).itemsize for key in keys), default=1) for reader in readers]
    return [torch.empty(entries * width, dtype=torch.uint8) for width in widest]


def _read(merger: Merger, work: Sequence[Piece], empty: Line[list[torch.Tensor]], ready: Line[Filled]) -> None:
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
            buffers = empty.get()
            parts = [_fill(files, reader, piece, own, floods) for reader, own in zip(readers, buffers, strict=True)]
            ready.put(Filled(buffers, parts))


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


# -- writing ---------------------------------------------------------------------------------------


def _write(files: Mapping[Path, Header], metadata: Mapping[str, str], done: Line[tuple[str, torch.Tensor]]) -> None:
    for path, header in files.items():
        with stream_to(path, header, metadata) as writer:
            while not writer.complete:
                writer.write_part(*done.get())
                writer.hand_over(BEHIND)
