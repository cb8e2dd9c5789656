"""LoRAs merged into one LoRA: exactly where the method is linear, else by its dense change and a decomposition.

sum_i w_i s_i B_i A_i is B A with B = [w_1 s_1 B_1, ...] and A = [A_1; ...]: ranks add up, nothing is lost. A and B are
never merged apart, which would give (sum w_i B_i)(sum w_i A_i), another matrix. At a given rank the product is
decomposed through QR of its factors, without being formed. Other methods see dense changes on a base of 0.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from zlib import crc32

import torch

from deme_diffusion.errors import UserError
from deme_diffusion.lora import Factors
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.lora_weights import LoraWeights, all_loras
from deme_diffusion.merging.remarks import EVERY
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.statistics import Statistics
from deme_diffusion.merging.stream import torch_threads
from deme_diffusion.merging.table import LINEAR
from deme_diffusion.merging.vectors import finite

log = logging.getLogger(__name__)
ROWS = 16
ROUNDING = 1e-6
"""Relative error of a decomposition that loses nothing."""
Term = tuple[float, Factors]


@dataclass
class MergedLora:
    """Layer -> merged factors, with squares of the Frobenius norms of each layer's change and of what was cut off."""

    layers: dict[str, Factors] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether nothing was cut off but what float32 rounds away."""
        return self.relative_error <= ROUNDING

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what was cut off over that of the change, all layers together."""
        return _ratio(math.fsum(self.lost.values()), math.fsum(self.norms.values()))

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest relative error, and that."""
        errors = {name: _ratio(self.lost[name], self.norms[name]) for name in self.layers}
        return max(errors.items(), key=lambda item: item[1])

    @property
    def rank(self) -> int:
        """The largest of all layers."""
        return max(own.rank for own in self.layers.values())


def merged_lora(
    merger: Merger, weights: MergeWeights, rank: int | None = None, observe: Statistics | None = None
) -> MergedLora:
    """The merger's LoRAs as one. `rank`: at most so much in every layer; None: as much as is exact for linear methods.

    Raises UserError where the result is not finite.
    """
    weights, merged, last = merger.check(weights), MergedLora(), time.monotonic()
    names = [name for name in _layers(merger) if any(name in reader.lora.layers for reader in loras_of(merger))]
    small = rank is None and merger.row.name in LINEAR  # products that several threads would only be slower at
    with torch_threads(1 if small else None):
        for count, name in enumerate(names):
            found = _merged_layer(merger, name, weights, rank, observe)
            merged.layers[name], merged.norms[name], merged.lost[name] = found
            if time.monotonic() - last >= EVERY:
                log.info("%d of %d layers merged", count + 1, len(names))
                last = time.monotonic()
    return _without_zeros(merged)


def _merged_layer(
    merger: Merger, name: str, weights: MergeWeights, rank: int | None, observe: Statistics | None
) -> tuple[Factors, float, float]:
    """Factors of one layer, squares of norm and loss."""
    key = f"{name}.weight"
    own = [reader.factors(key) for reader in loras_of(merger)]
    if observe is not None:
        _show(observe, merger, key, own)
    terms = _terms(merger, key, weights, own)
    dense = terms is None
    found = _dense(merger, key, weights, own, rank) if dense else _joined(terms or [], merger.base.shape(key), rank)
    _check_finite(merger, key, found[0])
    return found


def loras_of(merger: Merger) -> list[LoraWeights]:
    """Its experts' readers; every one must be a LoRA's."""
    found = all_loras(merger.experts)
    if found is None:
        whole = next(reader for reader in merger.experts if not isinstance(reader, LoraWeights))
        raise UserError(f"{whole.path}: a whole model among LoRAs: they are merged into a whole model, with fuse")
    return found


# -- linear methods --------------------------------------------------------------------------------


def _terms(merger: Merger, key: str, weights: MergeWeights, own: Sequence[Factors | None]) -> list[Term] | None:
    """The weighted changes that a linear method adds; None where the method is another."""
    kept = weights.kept(key)
    if kept is not None:
        values: Sequence[float] = [float(i == kept) for i in range(len(own))]
    elif merger.row.name == "average":
        values = [1 / len(own)] * len(own)
    elif merger.row.name in LINEAR:
        values = weights.at(key)
    else:
        return None
    return [(w, factors) for w, factors in zip(values, own, strict=True) if w and factors is not None]


def _joined(terms: Sequence[Term], shape: Sequence[int], rank: int | None) -> tuple[Factors, float, float]:
    """Factors side by side, of as much rank as they have together or at most `rank`; squares of norm and loss."""
    if not terms:
        return _zero(shape), 0.0, 0.0
    down = torch.cat([own.down.float() for _, own in terms])
    up = torch.cat([(w * own.scale) * own.up.float() for w, own in terms], dim=1)
    joined, most = Factors(down, up, 1.0), min(shape[0], prod(shape[1:]))  # no matrix has more rank than that
    rank = most if rank is None else min(rank, most)
    if rank >= joined.rank:
        return joined, _square(joined), 0.0
    values, left, right = _decomposed(joined)
    squares = values.square()
    return _cut(values, left, right, rank, shape), float(squares.sum()), float(squares[rank:].sum())


def _square(own: Factors) -> float:
    """||B A||^2 = <B^T B, A A^T>, without the product."""
    up, down = own.up.double().flatten(1), own.down.double().flatten(1)
    return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))


def _decomposed(own: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular values S and U, V^T of B A in float64, through QR of B and of A^T: never (out, in)."""
    left, upper = torch.linalg.qr(own.up.double().flatten(1))
    right, lower = torch.linalg.qr(own.down.double().flatten(1).T)
    u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return values * own.scale, left @ u, v @ right.T


# -- the others ------------------------------------------------------------------------------------


def _dense(
    merger: Merger, key: str, weights: MergeWeights, own: Sequence[Factors | None], rank: int | None
) -> tuple[Factors, float, float]:
    """The method on dense changes, with a base of 0; decomposed to the rank asked for, or to that of all together."""
    shape = merger.base.shape(key)
    zeros = torch.zeros(shape)
    deltas = [zeros if factors is None else factors.delta().float() for factors in own]
    information = [reader.tensor(key) for reader in merger.fisher] or None
    change = merger.method_on(key, zeros, deltas, weights.at(key), information).reshape(shape)
    together = sum(factors.rank for factors in own if factors is not None)
    return decomposed_to(change, together if rank is None else rank)


def decomposed_to(change: torch.Tensor, rank: int) -> tuple[Factors, float, float]:
    """The best product of so much rank (Eckart and Young 1936), by the smaller Gram matrix in float64."""
    matrix = change.double().flatten(1)
    if not bool(torch.isfinite(matrix).all()):
        raise UserError("the merged change of a layer is not finite")
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    vectors = torch.linalg.eigh(gram)[1].flip(1)[:, : min(rank, gram.shape[0])]
    up, down = (vectors, vectors.T @ matrix) if wide else (matrix @ vectors, vectors.T)
    total, kept = float(matrix.square().sum()), float((down if wide else up).square().sum())
    return _factors(up, down, change.shape), total, max(0.0, total - kept)


# -- factors ---------------------------------------------------------------------------------------


def _cut(values: torch.Tensor, left: torch.Tensor, right: torch.Tensor, rank: int, shape: Sequence[int]) -> Factors:
    root = values[:rank].sqrt()
    return _factors(left[:, :rank] * root, root[:, None] * right[:rank], shape)


def _factors(up: torch.Tensor, down: torch.Tensor, shape: Sequence[int]) -> Factors:
    """As adapters hold them: of a convolution A has the kernel, and B is pointwise."""
    rank, ones = down.shape[0], [1] * (len(shape) - 2)
    return Factors(down.reshape(rank, *shape[1:]).float(), up.reshape(-1, rank, *ones).float(), 1.0)


def _zero(shape: Sequence[int]) -> Factors:
    return _factors(torch.zeros(shape[0], 1), torch.zeros(1, prod(shape[1:])), shape)


def _without_zeros(merged: MergedLora) -> MergedLora:
    """Without the layers that nothing changes; all of them where none is, since a LoRA must have some."""
    moved = [name for name, norm in merged.norms.items() if norm] or list(merged.layers)
    return MergedLora(
        {name: merged.layers[name] for name in moved},
        {name: merged.norms[name] for name in moved},
        {name: merged.lost[name] for name in moved},
    )


def _layers(merger: Merger) -> Iterator[str]:
    return (key.removesuffix(".weight") for key in merger.keys() if key.endswith(".weight"))  # noqa: SIM118


def _show(observe: Statistics, merger: Merger, key: str, own: Sequence[Factors | None]) -> None:
    """Of a big model one row in `ROWS` of each layer: the products of all would take longer than the merge."""
    step = ROWS if observe.sampled and merger.base.shape(key)[0] >= ROWS else 1
    base = merger.base.tensor(key)[crc32(key.encode()) % step :: step].double()
    changed = [base if factors is None else base + _rows(factors, key, step) for factors in own]
    flat = [tensor.reshape(-1) for tensor in changed]
    observe.see_sample(key, base.reshape(-1), flat, prod(merger.base.shape(key)))


def _rows(own: Factors, key: str, step: int) -> torch.Tensor:
    return Factors(own.down, own.up[crc32(key.encode()) % step :: step], own.scale).delta()


def _check_finite(merger: Merger, key: str, found: Factors) -> None:
    if finite(found.up) and finite(found.down):
        return
    for reader in loras_of(merger):
        own = reader.factors(key)
        if own is not None and not (finite(own.up) and finite(own.down)):
            raise UserError(f"{key}: the merged factors are not finite: NaN or infinity in {reader.path}")
    raise UserError(f"{key}: the merged factors are not finite: too large; lower the weights")


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0
