"""What the spectral methods cost, from shapes alone, so that a long merge is told before it starts. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

CHOLESKY = 2.5  # flops a cubed side of what WUDI does with a matrix of full rank: two factorisations
EIGH = 14.0  # flops a cubed side of an eigendecomposition, at the rate of a matrix product: measured, float64, LAPACK


def spectral_cost(
    shapes: Iterable[Sequence[int]], num_experts: int, method: str, rank: float | None = None
) -> tuple[float, int]:
    """Flops of merging tensors of these shapes, and the bytes that the largest holds while it is merged.

    Everything is in float64. `rank` is TSV's option. WUDI is taken to meet task vectors of full rank.
    Raises KeyError for a method that is not spectral.
    """
    cost = {"tsv": _tsv, "iso_c": _iso_c, "wudi": _wudi}[method]
    sides = [(shape[0], prod(shape[1:])) for shape in shapes if len(shape) > 1 and 0 not in shape]
    costs = [cost(rows, columns, num_experts, rank) for rows, columns in sides]
    return sum((flops for flops, _ in costs), 0.0), 8 * max((numbers for _, numbers in costs), default=0)


def tsv_rank(short: int, num_experts: int, rank: float | None) -> int:
    """Singular vectors that TSV keeps of each expert's matrix with that short side: the share `rank`, 1/N if null."""
    return max(1, int((1 / num_experts if rank is None else rank) * short * (1 + 1e-12)))


def _tsv(rows: int, columns: int, experts: int, rank: float | None) -> tuple[float, int]:
    short, long = sorted((rows, columns))
    k = tsv_rank(short, experts, rank)
    total = k * experts
    each = 2 * short**2 * long + EIGH * short**3 + 2 * rows * columns * k
    polar = sum(4 * side * min(side, total) * total + EIGH * min(side, total) ** 3 for side in (rows, columns))
    numbers = 3 * rows * columns + 3 * total * (rows + columns) + 3 * min(long, total) ** 2
    return experts * each + polar + 2 * rows * columns * total, numbers


def _iso_c(rows: int, columns: int, experts: int, rank: float | None) -> tuple[float, int]:
    short, long = sorted((rows, columns))
    return 4 * short**2 * long + 2 * short**3 + EIGH * short**3, 4 * rows * columns + 4 * short**2


def _wudi(rows: int, columns: int, experts: int, rank: float | None) -> tuple[float, int]:
    stacked = rows * experts
    side, other = sorted((stacked, columns))
    short, long = sorted((rows, columns))
    gram = 2 * side**2 * other
    numerator = 2 * experts * (rows**2 * columns if stacked <= columns else 2 * short**2 * long)
    rest = 2 * rows * side**2 + 2 * rows * stacked * columns + CHOLESKY * side**3
    return gram + numerator + rest, stacked * columns + 3 * rows * columns + 3 * side**2 + 2 * rows * side
