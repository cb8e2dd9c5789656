"""A figure's data on disk: one .npz with its arrays, what kind of figure it is, and plain facts about it. No torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.errors import UserError
from deme_diffusion.files import replacing

META = "meta"
"""The array that holds the kind and the facts, as JSON text."""


@dataclass(frozen=True)
class FigureData:
    """`kind` (one of `config.FIGURES`), plain `meta` (names, units, settings, numbers), `arrays` by name, and the file
    that they were read from."""

    kind: str
    meta: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]
    path: str = ""

    def require(self, facts: Sequence[str], lengths: Mapping[str, int] | None = None, **axes: str) -> None:
        """Check for what a drawing needs: `facts` of the meta, and arrays by name with a letter or digit an axis.

        Axes of one letter are of one length, which `lengths` may give; a digit is a length, a last + any axes more.
        Raises UserError, naming the file, for what is missing or shaped otherwise.
        """
        where = self.path or f"data of the figure {self.kind}"
        if missing := [*(n for n in facts if n not in self.meta), *(n for n in axes if n not in self.arrays)]:
            raise UserError(f"{where}: no {', '.join(missing)} in it; draw it from what this version's analyze wrote")
        known = {str(digit): digit for digit in range(10)} | dict(lengths or {})
        for name, letters in axes.items():
            own = self.arrays[name].shape
            shape = own[: len(letters) - 1] if letters.endswith("+") else own
            letters = letters.removesuffix("+")
            for letter, length in zip(letters, shape, strict=False):
                known.setdefault(letter, length)
            if shape != (expected := tuple(known.get(letter, 0) for letter in letters)):
                raise UserError(f"{where}: {name} is of shape {own}; {expected} belongs there")


def write_figure(path: Path, kind: str, meta: Mapping[str, Any], **arrays: npt.ArrayLike) -> None:
    """Write a figure's data, atomically; no array may be called `meta`, or hold objects."""
    told = np.array(json.dumps({"kind": kind, **meta}))
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **{META: told}, **{n: np.asarray(a) for n, a in arrays.items()})


def read_figure(path: Path) -> FigureData:
    """A figure's data. Raises UserError where the file is missing, broken, or no figure's; pickles are never loaded."""
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        meta = json.loads(str(arrays.pop(META)))
        return FigureData(str(meta.pop("kind")), meta, arrays, str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except (KeyError, TypeError, AttributeError, ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path}: no figure's data; a .npz that deme analyze wrote is expected") from None
