"""Loss around the pretrained model (Fig. 4): over all timesteps and in each range, along two directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from deme_diffusion.analysis.directions import Shell, Vector, leading_directions, random_direction
from deme_diffusion.analysis.grid import Grid, held, identity, least, plain
from deme_diffusion.analysis.models import Load, each_in_float32, protocol
from deme_diffusion.analysis.paired import Changes, Paired
from deme_diffusion.config import AnalyzeSettings
from deme_diffusion.config.analysis import RADII
from deme_diffusion.figure_file import write_figure
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.models.precision import in_float32

Array = npt.NDArray[np.float64]


def write_landscape(
    path: Path,
    noise: FixedNoise,
    base: nn.Module,
    experts: Sequence[Load],
    settings: AnalyzeSettings,
    *,
    names: Sequence[str],
    partial: Path,
) -> dict[str, Any]:
    """Leave a figure's data: `loss` (R, P, P) of each range at base + a d_1 + b d_2, `overall` (P, P) over all of them,
    `error` (1 + R, P, P), standard errors of the change from the base, and axes `a` (P,) and `b` (P,), which is 0 alone
    where one task vector gives one direction.

    With directions of task vectors also where these lie along them, `coordinates` (N, 2). Goes on from what is in the
    folder `partial`. Returns: the numbers of all timesteps, as `told` gives them.
    """
    base, experts = in_float32(base), each_in_float32(experts)
    directions, facts, arrays = _directions(base, experts, settings, names)
    radius = settings.landscape_radius or RADII[settings.directions]
    axes = [axis(radius, settings.landscape_points) if k < len(directions) else np.zeros(1) for k in range(2)]
    on, paired = protocol(noise, settings), Paired.of(held(noise), base)
    shell, grid = Shell(base, directions), Grid(*axes)
    header = {"directions": settings.directions, **on, **identity(paired, directions)}
    rows = grid.rows(
        lambda a, b: paired.row(shell.at(*(a, b)[: len(directions)])), partial, title="landscape", header=header
    )
    changes = paired.changes(rows)
    numbers = [told(changes, row, grid) for row in range(len(changes.losses))]
    meta = {"experts": list(names), "radius": radius, "protocol": on, **facts, "told": numbers}
    arrays |= {"loss": changes.losses[1:], "overall": changes.losses[0], "error": changes.error}
    write_figure(path, "landscape", meta, a=grid.a, b=grid.b, **arrays)
    return numbers[0]


def axis(radius: float, points: int) -> Array:
    """An odd number of points from -radius to radius, of which the middle one is 0 to the bit."""
    half = points // 2
    return radius * np.arange(-half, half + 1) / max(half, 1)


def told(changes: Changes, row: int, grid: Grid) -> dict[str, Any]:
    """What a landscape says in numbers, over [0, T) (row 0) or in a range; null where a loss is not finite.

    `base`: the loss in the middle. `rise`: the mean loss on the border relative to it, less 1. `curvature`: the mean
    second derivative along the axes in the middle, relative to the base's loss, per squared unit of the axes. `least`:
    the least loss of the grid (`grid.least`).
    """
    loss = changes.losses[row]
    i, j = len(grid.a) // 2, len(grid.b) // 2
    base = float(loss[i, j])
    lines = [(loss[:, j], i, grid.a), (loss[i], j, grid.b)]
    bends = [_second_difference(line, at, along) / base for line, at, along in lines if len(along) > 1]
    rise = float(loss[border(loss)].mean()) / base - 1
    numbers = {"base": plain(base), "rise": plain(rise), "curvature": plain(_mean(bends))}
    return {**numbers, "least": least(changes, row, grid)}


def _second_difference(line: Array, at: int, along: Array) -> float:
    return float((line[at - 1] - 2 * line[at] + line[at + 1]) / (along[at + 1] - along[at]) ** 2)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def border(loss: Array) -> npt.NDArray[np.bool_]:
    """The cells (P, Q) on the border of a map, or at the ends of a curve."""
    edge = np.zeros(loss.shape, np.bool_)
    if loss.shape[0] > 1:
        edge[[0, -1]] = True
    if loss.shape[1] > 1:
        edge[:, [0, -1]] = True
    return edge if edge.any() else ~edge


def _directions(
    base: nn.Module, experts: Sequence[Load], settings: AnalyzeSettings, names: Sequence[str]
) -> tuple[list[Vector], dict[str, Any], dict[str, Array]]:
    """The directions, facts about them, and arrays."""
    if settings.directions == "random":
        facts = {"directions": "random", "unit": "the norm of each filter"}
        return [random_direction(base, settings.seed, number) for number in range(2)], facts, {}
    leading = leading_directions(base, experts, names)
    facts = {"directions": "task_vectors", "unit": "root mean square norm of the task vectors"}
    numbers = {"unit_length": leading.unit, "shares": leading.shares, "norms": leading.norms.tolist()}
    return leading.directions, {**facts, **numbers}, {"coordinates": leading.coordinates}
