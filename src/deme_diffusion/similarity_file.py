"""Files of gradient similarities: what the stage `similarity` leaves, or a matrix of anybody's. No torch."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deme_diffusion.division import uniform
from deme_diffusion.divisions import Similarity
from deme_diffusion.errors import UserError

NAMES = ("cosine", "similarity")
"""What the matrix is called in a file that holds several things."""
ASYMMETRY, EXCESS = 1e-4, 1e-3
"""How far two cosines of one pair may differ, and how far one may lie outside [-1, 1], by rounding."""


def read_similarity(path: Path, num_timesteps: int, *, key: str = "decouple.similarity_file") -> Similarity:
    """The cosines (K, K) in a .npz, .npy or .json file, K at most T; equal bins where it holds no `edges` (K + 1,).

    A .npz or a JSON object names them `cosine` or `similarity`. Raises UserError for anything else: no such file, not
    square, complex, not symmetric, not finite, outside [-1, 1], not 1 on its diagonal, edges that do not lead from 0
    to T.
    """
    where = f"{key}: {path}"
    found = _opened(path, where)
    cosine, edges = _matrix(found, where), found.get("edges")
    bins = len(cosine)
    if bins > num_timesteps:
        raise UserError(f"{where}: {bins} x {bins} for {num_timesteps} timesteps; at most one bin a timestep")
    if edges is None:
        starts = np.flatnonzero(np.diff(uniform(bins, num_timesteps).route, prepend=-1))
        return Similarity(cosine, np.append(starts, num_timesteps))
    return Similarity(cosine, _edges(edges, bins, num_timesteps, where))


def _opened(path: Path, where: str) -> dict[str, Any]:
    """The arrays of a file by name; pickles are never loaded."""
    try:
        if path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {NAMES[0]: found}
        if path.suffix not in (".npz", ".npy"):
            raise UserError(f"{where}: a .npz, .npy or .json file is expected")
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            return {NAMES[0]: arrays}
        with arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, EOFError, zipfile.BadZipFile, RecursionError) as error:  # JSON's and numpy's are ValueErrors
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: cannot be read ({str(error).splitlines()[0][:120]})") from None


def _matrix(found: dict[str, Any], where: str) -> npt.NDArray[np.float64]:
    name = next((name for name in NAMES if name in found), None)
    if name is None:
        raise UserError(f"{where}: holds {', '.join(sorted(found)) or 'nothing'}, but no {' or '.join(NAMES)}")
    try:
        if np.iscomplexobj(found[name]):
            raise UserError(f"{where}: {name} holds complex numbers; cosines are real")
        cosine = np.asarray(found[name], dtype=np.float64)
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: {name} is no matrix of numbers") from None
    if cosine.ndim != 2 or cosine.shape[0] != cosine.shape[1] or not cosine.size:
        raise UserError(f"{where}: {name} has shape {cosine.shape}; a square matrix is needed")
    if not np.isfinite(cosine).all():
        raise UserError(f"{where}: {name} holds values that are not finite")
    if (difference := float(np.abs(cosine - cosine.T).max())) > ASYMMETRY:
        raise UserError(f"{where}: {name} is not symmetric, by {difference:.3g}")
    if (largest := float(np.abs(cosine).max())) > 1 + EXCESS:
        raise UserError(f"{where}: {name} holds {largest:.3g}; cosines lie between -1 and 1")
    if (off := float(np.abs(np.diagonal(cosine) - 1).max())) > EXCESS:
        raise UserError(f"{where}: {name} is off 1 by {off:.3g} on its diagonal; a gradient's cosine with itself is 1")
    return (cosine + cosine.T) / 2


def _edges(given: Any, bins: int, num_timesteps: int, where: str) -> npt.NDArray[np.int64]:
    try:
        values = np.asarray(given, dtype=np.float64)
    except (ValueError, TypeError):
        raise UserError(f"{where}: edges are no numbers") from None
    if values.shape != (bins + 1,):
        raise UserError(f"{where}: edges have shape {values.shape} for {bins} bins; {bins + 1} are needed")
    ascend = np.isfinite(values).all() and (np.diff(values) > 0).all() and (values == np.round(values)).all()
    if not ascend or values[0] != 0 or values[-1] != num_timesteps:
        raise UserError(f"{where}: edges must be whole numbers that ascend from 0 to {num_timesteps}")
    return values.astype(np.int64)
