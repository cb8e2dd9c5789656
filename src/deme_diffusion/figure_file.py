"""A figure's data on disk: one .npz with its arrays, what kind of figure it is, and plain facts about it. No torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
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
    """`kind` (one of `config.FIGURES`), plain `meta` (names, units, settings, numbers), and `arrays` by name."""

    kind: str
    meta: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]


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
        return FigureData(str(meta.pop("kind")), meta, arrays)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except (KeyError, TypeError, AttributeError, ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path}: no figure's data; a .npz that deme analyze wrote is expected") from None
