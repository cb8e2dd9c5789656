"""Loss on the plane of two task vectors (Fig. 6a)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from deme_diffusion.analysis.directions import NOTHING, Shell, Vector, combined, inner, left_over, task_vector
from deme_diffusion.analysis.grid import Grid, held, identity, least, plain
from deme_diffusion.analysis.models import Load, each_in_float32, protocol
from deme_diffusion.analysis.paired import Paired, told
from deme_diffusion.config import AnalyzeSettings
from deme_diffusion.figure_file import write_figure
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.models.precision import in_float32

Array = npt.NDArray[np.float64]
log = logging.getLogger(__name__)
FROM, TO = -0.2, 1.2
"""Coefficients of the axes, as in the paper's figure."""


def write_plane(
    path: Path,
    noise: FixedNoise,
    base: nn.Module,
    experts: Sequence[Load],
    merged: Load | None,
    settings: AnalyzeSettings,
    *,
    pair: tuple[int, int],
    names: Sequence[str],
    partial: Path,
) -> dict[str, Any]:
    """Leave a figure's data: `loss` (R, P, P) of each range at base + x u + y v, `overall` (P, P) over all of them,
    `error` (1 + R, P, P), standard errors of the change from the base, and axes `x` (P,) and `y` (P,), with u = tau_i
    and v the part of tau_j orthogonal to it.

    Where one task vector, or two of one direction, span no plane, an axis is 0 alone. `meta.marks` tells where base,
    experts and merged model stand: their coordinates, their distance from the plane relative to the length of their
    task vector, their own losses, and their change from the base's with its standard error. Goes on from what is in the
    folder `partial`. Returns: the losses over all timesteps of base and merged model, and the grid's optimum.
    """
    base, experts = in_float32(base), each_in_float32(experts)
    merged = None if merged is None else each_in_float32([merged])[0]
    on, plane = protocol(noise, settings), Plane.of(base, experts, pair, names)
    paired = Paired.of(held(noise), base)
    marks = [_mark("base", "base", None, (0.0, 0.0, 0.0), paired, base)]
    marks += _marks(plane, base, experts, merged, names, paired)
    header = {"pair": list(pair), **on, **identity(paired, plane.directions)}
    grid, shell = Grid(*plane.axes(settings.plane_points)), Shell(base, plane.directions)
    rows = grid.rows(lambda x, y: paired.row(shell.at(*plane.along(x, y))), partial, title="plane", header=header)
    changes = paired.changes(rows)
    best = least(changes, 0, grid)
    optimum = best and {"x": best.pop("a"), "y": best.pop("b"), **best}
    facts = {"pair": list(pair), "lengths": list(plane.lengths), "cosine": plane.cosine, "optimum": optimum}
    meta = {"experts": list(names), "protocol": on, **facts, "marks": marks}
    loss, overall = changes.losses[1:], changes.losses[0]
    write_figure(path, "plane", meta, loss=loss, overall=overall, error=changes.error, x=grid.a, y=grid.b)
    true = {mark["role"]: mark["losses"][0] for mark in marks if mark["role"] != "expert"}
    return {**true, "optimum": optimum}


@dataclass(frozen=True)
class Plane:
    """base + x u + y v: u = tau_i, v = tau_j - <tau_j, u> / <u, u> u (Gram-Schmidt); a direction of no length is
    left out of `directions`. `lengths` are |u| and |v|, `cosine` that of tau_i and tau_j."""

    u: Vector
    v: Vector
    lengths: tuple[float, float]
    cosine: float

    @classmethod
    def of(cls, base: nn.Module, experts: Sequence[Load], pair: tuple[int, int], names: Sequence[str]) -> Plane:
        """The plane of two experts; of one with itself, a line."""
        i, j = pair
        u = task_vector(base, experts[i](), names[i])
        v = task_vector(base, experts[j](), names[j]) if i != j else {}
        uu, vv = _finite(inner(u, u)), _finite(inner(v, v))
        cosine = inner(u, v) / math.sqrt(uu * vv) if uu * vv > 0 else 0.0
        if uu > 0 and v:
            combined(v, -inner(v, u) / uu, u)
            combined(v, -inner(v, u) / uu, u)  # once more: the first time leaves float32's rounding along u
        rest = inner(v, v)
        lengths = math.sqrt(uu), math.sqrt(rest) if rest > NOTHING * vv else 0.0
        if i != j and not all(lengths):
            log.warning("plane: the task vectors of %s and %s span none; a line is drawn", names[i], names[j])
        return cls(u, v, lengths, cosine)

    @property
    def directions(self) -> list[Vector]:
        """Those that lead anywhere."""
        return [vector for vector, length in zip((self.u, self.v), self.lengths, strict=True) if length]

    def along(self, x: float, y: float) -> list[float]:
        """The coefficients of `directions` at (x, y)."""
        return [c for c, length in zip((x, y), self.lengths, strict=True) if length]

    def axes(self, points: int) -> tuple[Array, Array]:
        """The grid's coefficients, rounded so that 0 and 1 are exact; 0 alone along a direction of no length."""
        every = np.round(np.linspace(FROM, TO, points), 12)
        first, second = (every if length else np.zeros(1) for length in self.lengths)
        return first, second

    def project(self, vector: Vector) -> tuple[float, float, float]:
        """(x, y, distance from the plane relative to the vector's length) of base + vector."""
        x, y = (
            inner(vector, direction) / length**2 if length else 0.0
            for direction, length in zip((self.u, self.v), self.lengths, strict=True)
        )
        own = math.sqrt(inner(vector, vector))
        return x, y, left_over(vector, self.along(x, y), self.directions) / own if own else 0.0


def _marks(
    plane: Plane,
    base: nn.Module,
    experts: Sequence[Load],
    merged: Load | None,
    names: Sequence[str],
    paired: Paired,
) -> Iterator[dict[str, Any]]:
    """Experts and merged model, loaded one after another."""
    models = [("expert", k, name, load) for k, (name, load) in enumerate(zip(names, experts, strict=True))]
    for role, index, name, load in [*models, *([("merged", None, "merged", merged)] if merged else [])]:
        module = load()
        yield _mark(role, name, index, plane.project(task_vector(base, module, name)), paired, module)


def _mark(
    role: str, name: str, index: int | None, at: tuple[float, float, float], paired: Paired, module: nn.Module
) -> dict[str, Any]:
    """One model: `losses` over [0, T), then of each range, at the model itself; null for what is no number."""
    place = {name: plain(value) for name, value in zip(("x", "y", "distance"), at, strict=True)}
    own = paired.changes(np.array(paired.row(module)))
    numbers = told(float(own.change[0]), float(own.error[0]))
    return {"role": role, "name": name, "index": index, **place, "losses": [*map(plain, own.losses)], **numbers}


def _finite(square: float) -> float:
    """A squared length; weights that are no numbers lead nowhere."""
    return square if math.isfinite(square) else 0.0
