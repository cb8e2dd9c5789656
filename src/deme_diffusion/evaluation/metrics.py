"""Distances between two sets of cached features (n x d arrays), in float64 whatever the features' own precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Features = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Statistics:
    """The Gaussian fitted to n features: mean (d,), covariance (d, d); other shapes, non-finite values: ValueError.

    n is None where it is not known, as of published statistics.
    """

    mean: Array
    covariance: Array
    n: int | None

    def __post_init__(self) -> None:
        d = self.mean.size
        if self.mean.shape != (d,) or self.covariance.shape != (d, d):
            raise ValueError(f"mean {self.mean.shape} and covariance {self.covariance.shape} are not (d,) and (d, d)")
        # Clipping at 0 would turn a NaN read from a cache into a perfect distance.
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("the statistics hold NaN or infinity")


def statistics(features: Features) -> Statistics:
    """Mean and unbiased covariance of features (n, d), n >= 2 and all finite, else ValueError."""
    x = _checked(features, name="features", minimum=2)
    mean = x.mean(axis=0)
    centred = x - mean
    return Statistics(mean=mean, covariance=centred.T @ centred / (len(x) - 1), n=len(x))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two Gaussians, in squared feature units; ValueError where d differs.

    ||mu_a - mu_b||^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), clipped at 0 (Heusel et al. 2017, Eq. 6).
    """
    _same_dimension(a.mean, b.mean)
    # The fewer the images, the lower the rank: factoring that side leaves the fewest zero eigenvalues to blur the root.
    first, second = sorted((a, b), key=lambda s: np.inf if s.n is None else s.n)
    cross = _trace_sqrt_product(first.covariance, second.covariance)
    means = float(np.sum((a.mean - b.mean) ** 2))
    return max(0.0, means + float(np.trace(a.covariance) + np.trace(b.covariance)) - 2 * cross)


def _trace_sqrt_product(a: Array, b: Array) -> float:
    """Tr (a b)^(1/2) of symmetric positive semidefinite matrices: a b and a^(1/2) b a^(1/2) share their spectrum."""
    root = _square_root_factor(a)
    eigenvalues = np.linalg.eigvalsh(root.T @ b @ root)
    return float(np.sqrt(np.clip(eigenvalues, 0.0, None)).sum())


def _square_root_factor(covariance: Array) -> Array:
    """L (d, rank) with L L^T = covariance, on its range only: the root of rounding noise would be 1e-8."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    factor: Array = vectors[:, kept] * np.sqrt(values[kept])
    return factor


def kernel_distance(
    a: Features, b: Features, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (KID) of features (n, d) and (m, d): mean and standard deviation (ddof=0) over random subsets.

    `subset_size` is clipped to min(n, m); where it takes both sets whole, one subset is all there are and the deviation
    is 0. ValueError where d differs or a subset would hold fewer than 2 (Binkowski et al. 2018, Sec. 4).
    """
    x, y = pair(a, b, names=("a", "b"), minimum=(2, 2))
    size = min(subset_size, len(x), len(y))
    if size < 2 or num_subsets < 1:
        raise ValueError(f"subset_size must be >= 2 and num_subsets >= 1, got {subset_size} and {num_subsets}")
    if size == len(x) == len(y):
        return squared_mmd(x, y), 0.0
    rng = np.random.Generator(np.random.Philox(seed))
    draws = [
        squared_mmd(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)])
        for _ in range(num_subsets)
    ]
    return float(np.mean(draws)), float(np.std(draws))


def squared_mmd(x: Array, y: Array) -> float:
    """Unbiased squared maximum mean discrepancy of x (n, d), y (m, d); may be negative (Gretton et al. 2012, Eq. 3)."""
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (_cubic_kernel(x, x), _cubic_kernel(y, y))]
    return float(sum(within) - 2 * _cubic_kernel(x, y).mean())


def _cubic_kernel(x: Array, y: Array) -> Array:
    """k(x, y) = (x.y / d + 1)^3 (Binkowski et al. 2018, Sec. 4)."""
    kernel: Array = (x @ y.T / x.shape[1] + 1.0) ** 3
    return kernel


def inception_score(logits: Features, *, splits: int = 10) -> tuple[float, float]:
    """Inception score of class logits (n, k): mean and standard deviation (ddof=0) over splits of the images.

    exp E_x KL(p(y|x) || p(y)), p(y) the split's own mean (Salimans et al. 2016, Sec. 4). Split i holds the images i,
    i + splits, ...: sets in the order of their classes are mixed alike. Fewer images than splits: as many splits.
    """
    x = _checked(logits, name="logits", minimum=1)
    if splits < 1:
        raise ValueError(f"splits must be >= 1, got {splits}")
    shifted = x - x.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    parts = [logs[i::splits] for i in range(min(splits, len(logs)))]
    scores = [np.exp(np.mean(np.sum(np.exp(part) * (part - _log_mean(part)), axis=1))) for part in parts]
    return float(np.mean(scores)), float(np.std(scores))


def _log_mean(logs: Array) -> Array:
    """Logarithm (1, k) of the mean over rows of exp(logs), which may underflow."""
    highest = logs.max(axis=0, keepdims=True)
    mean: Array = highest + np.log(np.mean(np.exp(logs - highest), axis=0, keepdims=True))
    return mean


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof=1), None for a single value; empty or non-finite values: ValueError."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"expected at least one finite number, got {values!r}")
    return float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else None


def pair(a: Features, b: Features, *, names: tuple[str, str], minimum: tuple[int, int]) -> tuple[Array, Array]:
    """Both sets in float64, with one and the same d; ValueError where one is not (n, d), n >= its minimum, finite."""
    x, y = (_checked(x, name=n, minimum=m) for x, n, m in zip((a, b), names, minimum, strict=True))
    _same_dimension(x, y)
    return x, y


def _checked(features: Features, *, name: str, minimum: int) -> Array:
    """The features in float64; ValueError unless (n, d), n >= minimum, d >= 1 and finite."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"{name} must be an array (n, d), got the shape {x.shape}")
    if len(x) < minimum:
        raise ValueError(f"{name} holds {len(x)} features, at least {minimum} are needed")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return x


def _same_dimension(a: Array, b: Array) -> None:
    """ValueError where the last axes differ: the features come from different extractors."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"features of different dimension: {a.shape[-1]} and {b.shape[-1]}")
