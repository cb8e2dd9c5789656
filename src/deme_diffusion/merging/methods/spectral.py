"""Methods on matrices (out, rest): a convolution (out, in, k, k) is (out, in k k). A bias or a scalar is averaged.

Gram matrices of the smaller side, in float64, take the place of singular value decompositions: a wide matrix costs
its short side cubed. Singular values under CUT count as none: a decomposition would invent directions for them, and
these methods would weigh them like the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch

from deme_diffusion.merging.estimate import EIGH, spectral_cost, tsv_rank
from deme_diffusion.merging.methods import Parameter
from deme_diffusion.merging.vectors import Weight

# Relative to the root of the sum of all squared singular values. Just above what rounding to float32 leaves in a task
# vector of a hundredth of its weights; the squares, which a Gram matrix has, are good to 1e-15 in float64.
CUT = 1e-5
PROBE = 384  # side of the eigendecomposition that this machine is timed on


def tsv(p: Parameter) -> Weight:
    """theta + U* diag(w_i s_i) V*^T, U* and V* the nearest isometries to [U_1 ... U_N] and [V_1 ... V_N].

    U_i, s_i, V_i: the leading singular vectors and values of tau_i (Gargiulo et al. 2025). Linearly
    dependent vectors have no nearest orthogonal matrix, but a nearest partial isometry, which is taken.
    """
    return _merge(p, _tsv, len(p.experts))


def _tsv(p: Parameter) -> torch.Tensor:
    parts = [_leading(_matrix(p, i), p.options.rank, len(p.experts)) for i in range(len(p.experts))]
    scales = torch.cat([w * s for w, (_, s, _) in zip(p.weights, parts, strict=True)])
    left, right = (_isometry(torch.cat([part[side] for part in parts], 1)) for side in (0, 2))
    return left * scales @ right.T


def iso_c(p: Parameter) -> Weight:
    """theta + mean(s) U V^T, where U diag(s) V^T = sum_i w_i tau_i (Marczak et al. 2025).

    Of a sum without full rank, the mean is that of the singular values that there are: sum(s) stays.
    """
    return _merge(p, _iso_c, len(p.experts))


def _iso_c(p: Parameter) -> torch.Tensor:
    total = p.weights[0] * _matrix(p, 0)
    for i, w in enumerate(p.weights[1:], 1):
        total.add_(_matrix(p, i), alpha=w)
    values, _ = spectrum = _spectrum(_gram(_wide(total)))
    return _isometry(total, spectrum) * (values.sqrt().mean() if len(values) else 0.0)


def wudi(p: Parameter) -> Weight:
    """theta + m with m sum_i |w_i| A_i = sum_i w_i tau_i A_i, A_i = tau_i^T tau_i / |tau_i|^2, of least norm.

    m is where sum_i |w_i| |(m - sgn(w_i) tau_i) tau_i^T|^2 / |tau_i|^2 is least, which Cheng et al. 2025 descend to. An
    expert that did not move, or has no weight, takes no part.
    """
    return _merge(p, _wudi, sum(map(abs, p.weights)))


def _wudi(p: Parameter) -> torch.Tensor:
    """m = D B (B^T B)^+ = D (B B^T)^+ B, by the smaller side.

    B stacks B_i = sgn(w_i) sqrt|w_i| tau_i / |tau_i|, and D has D_i = |tau_i| / sqrt|w_i| B_i B_i^T side by side.
    """
    lengths = {i: float(_matrix(p, i).norm()) for i, w in enumerate(p.weights) if w}
    live = [i for i, length in lengths.items() if length]
    rows, columns = _matrix(p, 0).shape
    if not live:
        return torch.zeros_like(_matrix(p, 0))
    scales = [lengths[i] / math.sqrt(abs(p.weights[i])) for i in live]
    stacked = torch.empty(len(live) * rows, columns, dtype=torch.float64, device=p.base.value.device)
    for b, i, scale in zip(torch.split(stacked, rows), live, scales, strict=True):
        b.copy_(_matrix(p, i) * (p.weights[i] * scale / lengths[i] ** 2))
    parts = list(zip(scales, torch.split(stacked, rows), strict=True))
    if len(stacked) <= columns:
        return _divided(torch.cat([scale * _gram(b) for scale, b in parts], 1), _gram(stacked)) @ stacked
    db = torch.zeros_like(parts[0][1])
    for scale, b in parts:
        db += scale * (_gram(b) @ b if rows <= columns else b @ _gram(b.T))
    return _divided(db, _gram(stacked.T))


def estimated_seconds(
    shapes: Iterable[Sequence[int]], num_experts: int, method: str, rank: float | None = None
) -> float:
    """About how long merging tensors of these shapes takes here: flops over a rate timed once a process (0.1 s).

    Of WUDI with task vectors of full rank; it takes up to five times as long with those of LoRA.
    """
    return spectral_cost(shapes, num_experts, method, rank)[0] / _rate()


def _merge(p: Parameter, merged: Callable[[Parameter], torch.Tensor], divisor: float) -> Weight:
    """theta + the merged matrix; of what is no matrix, theta + sum_i w_i tau_i / divisor.

    So is what is not finite, which no decomposition takes: the caller's check of the result finds it there.
    """
    start = p.start()
    matrix = start.ndim > 1 and start.numel() > 0
    if matrix and all(bool(p.vector(i).isfinite().all()) for i in range(len(p.experts))):
        return Weight(start.add_(merged(p).reshape(start.shape)))
    for i, w in enumerate(p.weights):
        if w:
            start.add_(p.vector(i), alpha=w / divisor)
    return Weight(start)


def _matrix(p: Parameter, i: int) -> torch.Tensor:
    """tau_i as a matrix (out, rest) in float64."""
    return p.vector(i).flatten(1).double()


def _leading(
    tau: torch.Tensor, rank: float | None, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (rows, r), s (r), V (columns, r): the leading singular vectors and values; r is less where there are fewer."""
    wide = _wide(tau)
    values, vectors = _spectrum(_gram(wide))
    first = max(0, len(values) - tsv_rank(len(wide), num_experts, rank))
    s, near = values[first:].sqrt(), vectors[:, first:]
    far = wide.T @ near / s
    return (near, s, far) if wide is tau else (far, s, near)


def _isometry(matrix: torch.Tensor, spectrum: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """The polar factor (Procrustes): (X X^T)^{-1/2} X, over the directions that X has."""
    wide = _wide(matrix)
    values, vectors = spectrum or _spectrum(_gram(wide))
    polar = (vectors / values.sqrt()) @ (vectors.T @ wide)
    return polar if wide is matrix else polar.T


def _divided(numerator: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """numerator gram^+: by Cholesky where no eigenvalue is under the cut, which the factorisation itself tells."""
    shift = CUT**2 * float(gram.trace())
    _, singular = torch.linalg.cholesky_ex(gram - shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if not singular:
        return torch.cholesky_solve(numerator.T, torch.linalg.cholesky(gram)).T
    values, vectors = _spectrum(gram)
    return (numerator @ vectors / values) @ vectors.T


def _spectrum(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and eigenvectors (in columns), of those above CUT^2 of the trace."""
    values, vectors = torch.linalg.eigh(gram)
    there = values > CUT**2 * float(gram.trace())
    return values[there], vectors[:, there]


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    return matrix @ matrix.T


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or its transpose: no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


@cache
def _rate() -> float:
    """Flops a second of an eigendecomposition on this machine, now."""
    probe = torch.arange(PROBE**2, dtype=torch.float64).sin().view(PROBE, PROBE)
    torch.linalg.eigh(_gram(probe))  # the first call loads LAPACK
    start = time.perf_counter()
    torch.linalg.eigh(_gram(probe))
    return EIGH * PROBE**3 / (time.perf_counter() - start)
