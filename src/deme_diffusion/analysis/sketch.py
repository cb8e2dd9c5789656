"""Gradients of any length in a few dimensions, kept in a file, and the cosines between them, by tiles.

CountSketch (Charikar et al. 2002): each entry is added, with a random sign, to a random place. It is linear and keeps
inner products: a cosine c of two sketches has a standard deviation of about (1 - c^2) / sqrt(d) in d dimensions,
whatever the size of the model. Where d is no smaller than the model, the gradient is kept as it is, without error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deme_diffusion.files import explained, write_json
from deme_diffusion.rng import words

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
Read = Callable[[slice, slice], Array]
"""Rows and columns of vectors that need not be in memory."""
CHUNK = 1 << 15
"""Entries of a gradient that are sketched at once: 2 MB of memory, whatever the model."""
ROWS, COLUMNS = 32, 1024
"""A tile of vectors: 256 KB."""


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


# -- cosines --------------------------------------------------------------------------------------


def cosines(vectors: Array) -> Matrix:
    """(K, d) -> (K, K), exactly symmetric with a diagonal of 1; a vector of zeros is orthogonal to all others."""
    return cosines_of(lambda rows, columns: vectors[rows, columns], *vectors.shape)


def cosines_of(read: Read, count: int, size: int) -> Matrix:
    """`cosines` of (count, size) vectors of which no more than two tiles are in memory."""
    tiles = [slice(first, min(first + ROWS, count)) for first in range(0, count, ROWS)]
    cosine = np.zeros((count, count), dtype=np.float32)
    scale = np.concatenate([_inverse_norms(read, rows, size) for rows in tiles])
    for i, rows in enumerate(tiles):
        for others in tiles[: i + 1]:
            product = _product(read, rows, others, size) * scale[rows, None] * scale[None, others]
            cosine[rows, others] = np.clip(product, -1.0, 1.0)
            cosine[others, rows] = cosine[rows, others].T
        cosine[rows, rows] = (cosine[rows, rows] + cosine[rows, rows].T) / 2
    np.fill_diagonal(cosine, 1.0)
    return cosine


def _inverse_norms(read: Read, rows: slice, size: int) -> Array:
    squares = sum(np.square(read(rows, columns)).sum(axis=1) for columns in _columns(size))
    norms: Array = np.sqrt(np.asarray(squares, dtype=np.float64))
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def _product(read: Read, rows: slice, others: slice, size: int) -> Array:
    products = (read(rows, columns) @ read(others, columns).T for columns in _columns(size))
    return np.asarray(sum(products), dtype=np.float64)


def _columns(size: int) -> Iterator[slice]:
    return (slice(first, min(first + COLUMNS, size)) for first in range(0, size, COLUMNS))


# -- in a file ------------------------------------------------------------------------------------


class Sketches:
    """Sketches (K, 2, d) in a folder: of K bins, what each half of their images gives; and numbers about each bin.

    Memory holds the numbers, and two tiles when cosines are taken. What the folder holds already is gone on from:
    `done` says how many bins that are.
    """

    DATA, CURSOR = "sketches.f64", "cursor.json"

    def __init__(self, folder: Path, bins: int, size: int) -> None:
        self.shape = (bins, 2, size)
        self.norms: list[float] = []
        """Of the whole gradient."""
        self.agreements: list[float] = []
        """Cosine of the two halves."""
        self._data, self._cursor = folder / self.DATA, folder / self.CURSOR
        with explained("write", self._data):
            folder.mkdir(parents=True, exist_ok=True)
            self._data.touch()
        self._resume()

    @property
    def done(self) -> int:
        """Bins that are there."""
        return len(self.norms)

    def append(self, halves: Array, norm: float) -> None:
        """The next bin: `halves` (2, d), the whole gradient's norm. Not mapped to memory: a full disk is an error."""
        with explained("write", self._data), self._data.open("r+b") as file:
            file.seek(self.done * halves.nbytes)
            file.write(halves.data)
        lengths = float(np.linalg.norm(halves[0]) * np.linalg.norm(halves[1]))
        self.agreements.append(float(halves[0] @ halves[1]) / lengths if lengths else 0.0)
        self.norms.append(norm)

    def save(self) -> None:
        """Let an interruption from here on cost nothing that is there."""
        with explained("write", self._data), self._data.open("r+b") as file:
            os.fsync(file.fileno())
        write_json(self._cursor, {"shape": self.shape, "norms": self.norms, "agreements": self.agreements})

    def cosines(self, *halves: int) -> Matrix:
        """(K, K) of what these halves (0, 1 or both) of the images give together."""
        held: Any = np.memmap(self._data, dtype=np.float64, mode="r", shape=self.shape)

        def read(rows: slice, columns: slice) -> Array:
            return sum((held[rows, half, columns] for half in halves[1:]), np.array(held[rows, halves[0], columns]))

        return cosines_of(read, self.shape[0], self.shape[2])

    def _resume(self) -> None:
        with suppress(OSError, ValueError):
            saved = json.loads(self._cursor.read_bytes())
            if saved["shape"] == list(self.shape):
                there = self._data.stat().st_size // (2 * self.shape[2] * 8)
                self.norms, self.agreements = saved["norms"][:there], saved["agreements"][:there]
