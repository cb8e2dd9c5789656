"""The fast path of a merge: while some slices are merged, the next ones are read and the last ones written.

A reader thread fills a few buffers from the N + 1 files, a few threads merge them, a writer thread writes in order.
Methods that merge entry by entry get slices, so that memory does not grow with a tensor; the others get memory-mapped
tensors. Where slices need thresholds from the whole of each task vector, other threads look for those of the parameters
to come: what they read stays in the page cache for the reader. The bits depend neither on the slices' size nor on the
threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from deme_diffusion.files import expect
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.methods import Thresholds
from deme_diffusion.merging.reading import Filled, Piece, buffers, pieces, read
from deme_diffusion.merging.remarks import Progress, note_left_out
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.threads import Line, Worker, running
from deme_diffusion.merging.vectors import computable, slices, wide
from deme_diffusion.weights import Header, stream_to

SLICE = 1 << 17
"""Entries of a slice: N + 1 of them stay in a processor's cache, and a read is still long enough for any disk."""
DEPTH, BEHIND = 3, 1 << 24
"""Slices between two threads; bytes after which a written file's pages are handed to the disk."""
THREADS, LOOKERS = 4, 2
"""At most so many merge, and look: of a task vector as long as the parameter is each of these holds the sizes."""
AHEAD = 1 << 25
"""Entries of parameters that are looked at before their turn; N + 1 times as many stay in the page cache."""


class Observer(Protocol):
    """Somebody who looks on while a merge streams."""

    def see(self, key: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        """Flat slices of one parameter (or all of it) in float32 or wider; each entry comes exactly once."""


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

    Raises what any of the threads raises; whatever happens, they have ended when this returns.
    """
    work = [piece for header in files.values() for piece in pieces(merger, header, entries)]
    pointwise = merger.row.pointwise
    threads = min(THREADS, torch.get_num_threads()) if pointwise else 1  # whole tensors are big
    ready, empty = Line[Filled](DEPTH), Line[list[torch.Tensor]](DEPTH + threads)
    done = Line[tuple[str, Future[torch.Tensor]]](DEPTH if pointwise else 1)
    for _ in range(DEPTH + threads if any(piece.at for piece in work) else 0):
        empty.put(buffers(merger, entries))
    lines = (ready, empty, done)
    reader = Worker(lambda: read(merger, work, empty, ready), lines)
    writer = Worker(lambda: _write(files, metadata, done), lines)
    equal, progress = [not matrices for matrices in merger.matrices], Progress(len(merger.keys()))

    def merged(piece: Piece, filled: Filled, looks: Sequence[Future[Thresholds]]) -> torch.Tensor:
        part = _merged(merger, weights, piece, filled, dtype, [look.result() for look in looks])
        if filled.buffers is not None:
            empty.put(filled.buffers)
        return part

    with torch_threads(1 if pointwise else None), _pool(min(LOOKERS, threads)) as lookers, _pool(threads) as pool:
        ahead = Ahead(merger, weights, lookers, deque(_looked_at(merger, weights, work)))
        with running(reader, writer):
            for piece in work:
                looks = ahead.of(piece.key)
                filled = ready.get()
                parts = filled.parts or [reader.tensor(piece.key) for reader in (merger.base, *merger.experts)]
                _compare(equal, parts)
                note_left_out(merger, piece.key, weights, parts)
                progress.at(piece.key)
                if observe is not None:
                    _show(observe, piece.key, parts)
                done.put((piece.key, pool.submit(merged, piece, filled, looks)))
            writer.join()
    if observe is not None:
        for name, zeros, matrices in merger.projections():
            _show(observe, name, [zeros, *matrices])
    merger.note_equal(equal)


def _merged(
    merger: Merger,
    weights: MergeWeights,
    piece: Piece,
    filled: Filled,
    dtype: torch.dtype | None,
    thresholds: Sequence[Thresholds],
) -> torch.Tensor:
    if piece.at is None:
        return merger.tensor(piece.key, weights, dtype)
    base, *experts = filled.parts
    part = merger.part(piece.key, weights, base, experts, piece.at, thresholds or None)
    merged = merger.finished(piece.key, part, dtype, base)
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


# -- looking ahead ---------------------------------------------------------------------------------


def _looked_at(merger: Merger, weights: MergeWeights, work: Sequence[Piece]) -> list[str]:
    """The parameters whose slices need thresholds, in the order of the work."""
    return list(dict.fromkeys(p.key for p in work if p.at is not None and merger.looks(p.key, weights)))


@dataclass
class Ahead:
    """The thresholds of the parameters that are merged now and next, each found by one look at a whole task vector."""

    merger: Merger
    weights: MergeWeights
    lookers: ThreadPoolExecutor
    waiting: deque[str]
    _looks: dict[str, list[Future[Thresholds]]] = field(default_factory=dict, init=False)
    _entries: int = field(default=0, init=False)
    _now: str = field(default="", init=False)

    def of(self, key: str) -> list[Future[Thresholds]]:
        """Those of a parameter; nothing where it needs none. Parameters are asked for in the order of `waiting`."""
        if key != self._now and self._looks.pop(self._now, []):
            self._entries -= prod(self.merger.base.shape(self._now))
        self._now = key
        while self.waiting and self._entries < AHEAD:
            own = self.waiting.popleft()
            self._looks[own] = [self.lookers.submit(self._look, own, i) for i in range(len(self.merger.experts))]
            self._entries += prod(self.merger.base.shape(own))
        return self._looks.get(key, [])

    def _look(self, key: str, i: int) -> Thresholds:
        for reader in (self.merger.base, self.merger.experts[i]):
            entry = reader.entry(key)
            with entry.file.open("rb", buffering=0) as file:
                expect(file, entry.start, entry.nbytes)
        return self.merger.thresholds(key, i)


# -- the threads -----------------------------------------------------------------------------------


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that work on slices, each with as many of torch's own as this one has; at the end all have ended."""
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def torch_threads(wanted: int | None) -> Iterator[None]:
    """Where several threads of ours are at work on slices, torch's own would only be in their way."""
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- writing ---------------------------------------------------------------------------------------


def _write(
    files: Mapping[Path, Header], metadata: Mapping[str, str], done: Line[tuple[str, Future[torch.Tensor]]]
) -> None:
    for path, header in files.items():
        with stream_to(path, header, metadata) as writer:
            while not writer.complete:
                key, part = done.get()
                writer.write_part(key, part.result())
                writer.hand_over(BEHIND)
