"""Gradients of any length in a few dimensions, kept in a file, and the products between them, by tiles.

CountSketch (Charikar et al. 2002): each entry is added, with a random sign, to a random place. It is linear and keeps
inner products: a cosine c of two sketches has a standard deviation of about (1 - c^2) / sqrt(d) in d dimensions,
whatever the size of the model. Where d is no smaller than the model, the gradient is kept as it is, without error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from deme_diffusion.errors import MachineError
from deme_diffusion.files import explained, write_json
from deme_diffusion.rng import words

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
Read = Callable[[slice, slice], Array]
"""Rows and columns of (K, G, d) vectors that need not be in memory: K sums of G groups."""
FLOAT = 4
"""Bytes of a number in the file."""
CHUNK = 1 << 15
"""Entries of a gradient that are sketched at once: 2 MB of memory, whatever the model."""
ROWS, COLUMNS = 32, 512
"""A tile of vectors: 1 MB where there are eight groups."""
FEWEST = 4
"""Groups that a standard error needs: of three, noise alone is beyond two of them in more than 5% of the cases."""


def sketch_into(sketch: Array, gradient: Sequence[torch.Tensor], seed: int) -> float:
    """Fill `sketch` (d,) with a gradient, as it is where it has d entries; returns the gradient's norm."""
    exact, squares, first = sum(tensor.numel() for tensor in gradient) <= len(sketch), 0.0, 0
    sketch[:] = 0.0
    for values in _chunks(gradient):
        if exact:
            sketch[first : first + len(values)] = values
        else:
            place, sign = _hashed(seed, first, len(values), len(sketch))
            np.add.at(sketch, place, values * sign)
        squares += float(values @ values)
        first += len(values)
    return math.sqrt(squares)


def _chunks(gradient: Sequence[torch.Tensor]) -> Iterator[Array]:
    for tensor in gradient:
        flat = tensor.detach().flatten()
        for first in range(0, len(flat), CHUNK):
            yield flat[first : first + CHUNK].double().cpu().numpy()


def _hashed(seed: int, first: int, count: int, size: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Place and sign of the entries first, first + 1, ...: a function of the entry alone."""
    drawn = words(seed, "similarity sketch", first=first, count=count).view(np.uint32)
    place = (drawn >> 1).astype(np.int64) * size >> 31
    return place, np.where(drawn & 1, -1.0, 1.0)


# -- products -------------------------------------------------------------------------------------


def cosines(vectors: Array) -> Matrix:
    """(K, d) -> (K, K), exactly symmetric with a diagonal of 1; a vector of zeros is orthogonal to all others."""
    return compared(lambda rows, columns: vectors[rows, None, columns], (len(vectors), 1, vectors.shape[1]), [1])[0]


def compared(read: Read, shape: tuple[int, int, int], sizes: Sequence[int]) -> tuple[Matrix, Matrix]:
    """Two (K, K): `cosines` of the sums over groups, and the same inner products without those within one group.

    The latter are divided by the same norms. Noise that groups do not share has a mean of 0 in them: they are unbiased
    for the expected vectors, of which each group is a sum over so many (`sizes`) draws. Of one group they are 0. No
    more than two tiles of the vectors are in memory.
    """
    count, size = shape[0], shape[2]
    tiles = [slice(first, min(first + ROWS, count)) for first in range(0, count, ROWS)]
    cosine, cross = np.zeros((count, count), dtype=np.float32), np.zeros((count, count), dtype=np.float32)
    scale = np.concatenate([_inverse_norms(read, rows, size) for rows in tiles])
    kept = _kept(sizes)
    for i, rows in enumerate(tiles):
        for others in tiles[: i + 1]:
            scales = scale[rows, None] * scale[None, others]
            together, within = (product * scales for product in _products(read, rows, others, size))
            _put(cosine, rows, others, np.clip(together, -1.0, 1.0))
            if kept:
                _put(cross, rows, others, (together - within) / kept)
    np.fill_diagonal(cosine, 1.0)
    return cosine, cross


def _kept(sizes: Sequence[int]) -> float:
    """The share of pairs of draws that lie in two groups."""
    return 1.0 - sum(size * size for size in sizes) / sum(sizes) ** 2


def _put(matrix: Matrix, rows: slice, others: slice, tile: Array) -> None:
    matrix[rows, others] = (tile + tile.T) / 2 if rows == others else tile
    matrix[others, rows] = matrix[rows, others].T


def _inverse_norms(read: Read, rows: slice, size: int) -> Array:
    squares = sum(np.square(read(rows, columns).sum(axis=1)).sum(axis=1) for columns in _columns(size))
    norms: Array = np.sqrt(np.asarray(squares, dtype=np.float64))
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def _products(read: Read, rows: slice, others: slice, size: int) -> tuple[Array, Array]:
    """Inner products of the sums over groups, and those within a group, summed over groups."""
    count = (rows.stop - rows.start, others.stop - others.start)
    together, within = np.zeros(count), np.zeros(count)
    for columns in _columns(size):
        one = read(rows, columns)
        other = one if rows == others else read(others, columns)
        together += one.sum(axis=1) @ other.sum(axis=1).T
        for group in range(one.shape[1]):
            within += one[:, group] @ other[:, group].T
    return together, within


def _columns(size: int) -> Iterator[slice]:
    return (slice(first, min(first + COLUMNS, size)) for first in range(0, size, COLUMNS))


def standard_error(gram: Array, sizes: Sequence[int]) -> tuple[float, float]:
    """Of the inner products of a bin's groups (G, G): the expected gradient's squared norm, unbiased, and its error.

    Both in units of the squared norm of the sum over all. The error is a jackknife's (each group left out in turn),
    infinite for fewer than `FEWEST` groups. It is too large where the expected gradient is 0, by half or more: of bins
    of noise alone, fewer than 1% lie beyond two errors for eight groups, and 2.5% for four.
    """
    count, draws = len(gram), np.asarray(sizes, dtype=np.float64)
    if count < FEWEST or (norm := float(gram.sum())) <= 0:
        return 0.0, math.inf
    apart = gram - np.diag(np.diag(gram))
    pairs = np.outer(draws, draws) - np.diag(draws**2)
    left = (apart.sum() - 2 * apart.sum(axis=1)) / (pairs.sum() - 2 * pairs.sum(axis=1))
    unit = norm / draws.sum() ** 2
    error = math.sqrt((count - 1) / count * float(np.square(left - left.mean()).sum()))
    return float(apart.sum() / pairs.sum() / unit), error / unit


# -- in a file ------------------------------------------------------------------------------------


class Sketches:
    """Sketches (K, G, d), of K bins by G groups of images, in a plain file; and numbers about each bin.

    Memory holds the numbers, one bin's tile as it is added, and two tiles when bins are compared: the file is not
    mapped. What the folder holds already is gone on from, where it was made the same way (`header`): `done` says how
    many bins that are.
    """

    DATA, CURSOR = "sketches.f32", "cursor.json"

    def __init__(self, folder: Path, bins: int, sizes: Sequence[int], size: int, header: Mapping[str, Any]) -> None:
        self.shape, self.sizes = (bins, len(sizes), size), list(sizes)
        self.header = {**header, "shape": [*self.shape], "sizes": self.sizes}
        self.norms: list[float] = []
        """Of the whole gradient."""
        self.squares: list[tuple[float, float]] = []
        """Unbiased squared norm of the expected gradient, and its standard error."""
        self._data, self._cursor = folder / self.DATA, folder / self.CURSOR
        with explained("write", self._data):
            folder.mkdir(parents=True, exist_ok=True)
            self._data.touch()
        self._resume()

    @property
    def done(self) -> int:
        """Bins that are there."""
        return len(self.norms)

    def put(self, group: int, sketch: Array) -> None:
        """A group's sketch (d,) of the next bin. Not mapped to memory: a full disk is an error."""
        with explained("write", self._data), self._data.open("r+b") as file:
            file.seek((self.done * self.shape[1] + group) * self.shape[2] * FLOAT)
            file.write(sketch.astype(np.float32).data)

    def close_bin(self, norm: float) -> None:
        """All groups of the next bin are there, and the whole gradient has that norm."""
        gram = np.zeros((self.shape[1],) * 2)
        with self._opened() as file:
            for columns in _columns(self.shape[2]):
                (tile,) = self._tile(file, slice(self.done, self.done + 1), columns)
                gram += tile @ tile.T
        self.squares.append(standard_error(gram, self.sizes))
        self.norms.append(norm)

    def save(self) -> None:
        """Let an interruption from here on cost nothing that is there."""
        with explained("write", self._data), self._data.open("r+b") as file:
            os.fsync(file.fileno())
        squares = [[square, error if math.isfinite(error) else None] for square, error in self.squares]
        write_json(self._cursor, {"header": self.header, "norms": self.norms, "squares": squares})

    def compared(self) -> tuple[Matrix, Matrix]:
        """`compared` of all bins."""
        with self._opened() as file:
            return compared(lambda rows, columns: self._tile(file, rows, columns), self.shape, self.sizes)

    def _opened(self) -> BinaryIO:
        return self._data.open("rb", buffering=0)

    def _tile(self, file: BinaryIO, rows: slice, columns: slice) -> Array:
        """Rows and columns of all groups."""
        _, groups, size = self.shape
        tile = np.empty((rows.stop - rows.start, groups, columns.stop - columns.start), dtype=np.float32)
        for i, row in enumerate(tile.reshape(-1, tile.shape[2]), start=rows.start * groups):
            file.seek((i * size + columns.start) * FLOAT)
            if file.readinto(row.data) != row.nbytes:  # type: ignore[attr-defined]
                raise MachineError(f"{self._data}: cut short while it was read")
        return tile.astype(np.float64)

    def _resume(self) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(self._cursor.read_bytes())
            if saved["header"] == json.loads(json.dumps(self.header)):
                there = self._data.stat().st_size // (self.shape[1] * self.shape[2] * FLOAT)
                squares = [(square, math.inf if error is None else error) for square, error in saved["squares"]]
                self.norms, self.squares = saved["norms"][:there], squares[:there]
