"""Losses beside the base's on the same points: what differs, and how far that is told from chance.

By image i: L_i, its loss over [0, T) (the mean over draws in each range, ranges weighted by their timesteps), and
e_i = (L_i - L_i(base)) / L(base). Images are independent, an image's points are not: the standard error of a change,
the mean of e_i, is sd(e_i) / sqrt(images). Sums are kept for even and odd images, so that a model can be picked on the
one half and judged on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from torch import nn

from deme_diffusion.division import from_runs
from deme_diffusion.models.objective import FixedNoise

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Changes:
    """Of models (...,) against the base, over [0, T) and then in each of R ranges.

    `losses` (1 + R, ...); `sums` (2 halves, 2 powers, 1 + R, ...) of e and e^2; `counts` (2,): images of each half.
    """

    losses: Array
    sums: Array
    counts: Array

    @property
    def change(self) -> Array:
        """(1 + R, ...) loss relative to the base's, less 1."""
        return np.asarray(self.sums[:, 0].sum(0) / self.counts.sum())

    @property
    def error(self) -> Array:
        """(1 + R, ...) standard error of the change."""
        return standard_error(self.sums[:, 0].sum(0), self.sums[:, 1].sum(0), float(self.counts.sum()))

    def half(self, half: int, row: int) -> Array:
        """(...,) the change on the even (0) or odd (1) images alone."""
        return np.asarray(self.sums[half, 0, row] / self.counts[half])

    def tested(self, picked: Sequence[tuple[int, ...]], row: int) -> tuple[float, float]:
        """Change and standard error of picking: of `picked[h]`, chosen on half h, each on the other half."""
        first, second = (sum(self.sums[(1 - h, k, row, *picked[h])] for h in (0, 1)) for k in (0, 1))
        count = float(self.counts.sum())
        return float(first / count), float(standard_error(np.asarray(first), np.asarray(second), count))


def standard_error(first: Array, second: Array, count: float) -> Array:
    """Of a mean, by the sums of `count` values and of their squares."""
    return np.sqrt(np.maximum(second - first**2 / count, 0.0) / (count - 1) / count)


@dataclass(frozen=True)
class Paired:
    """The base's losses by image, (1 + R, n), that other models' are compared with."""

    noise: FixedNoise
    base: Array

    @classmethod
    def of(cls, noise: FixedNoise, base: nn.Module) -> Self:
        """Take the base's losses."""
        return cls(noise, by_image(noise, base)[1])

    def row(self, module: nn.Module) -> list[float]:
        """One model as numbers in a line, for a journal; `changes` reads them."""
        losses, own = by_image(self.noise, module)
        with np.errstate(divide="ignore", invalid="ignore"):
            e = (own - self.base) / self.base.mean(1, keepdims=True)
            sums = [[(e[:, half::2] ** power).sum(1) for power in (1, 2)] for half in (0, 1)]
        return [*losses, *np.ravel(sums)]

    def changes(self, rows: Array) -> Changes:
        """Of lines (..., 5 (1 + R)); NaN where a loss is not finite."""
        height, images = self.base.shape
        moved = np.moveaxis(rows, -1, 0)
        sums = moved[height:].reshape(2, 2, height, *moved.shape[1:])
        return Changes(moved[:height], sums, np.array([images - images // 2, images // 2], np.float64))


def by_image(noise: FixedNoise, module: nn.Module) -> tuple[list[float], Array]:
    """A model's losses over [0, T) and in each range: (the 1 + R means, (1 + R, n) by image)."""
    points = noise.points(module)
    losses = [float(one.mean()) for one in points]
    images = np.stack([one.reshape(-1, noise.num_images).mean(0).cpu().numpy() for one in points])
    sizes = [noise.denoiser.mass(from_runs(runs)) for runs in noise.ranges]
    return [noise.overall(losses), *losses], np.vstack([np.average(images, axis=0, weights=sizes), images])


def told(change: float, error: float) -> dict[str, Any]:
    """Both for JSON: null where the change is no number."""
    finite = bool(np.isfinite(change) and np.isfinite(error))
    return {"change": float(change) if finite else None, "error": float(error) if finite else None}
