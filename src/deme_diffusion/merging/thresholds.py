"""Which |tau| stays when a share of the largest does: of one tensor, or exactly over a whole task vector, streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from deme_diffusion.merging.vectors import computable, slices, wide
from deme_diffusion.weights import Weights

BINS = 1 << 16  # of a half of a float32's bits


def kept(density: float, size: int) -> int:
    """How many of `size` entries a density keeps: rounded up, so that one stays wherever there is one."""
    return math.ceil(density * size * (1 - 1e-12))  # 0.1 * 30 is 3.0000000000000004


def magnitudes(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """|tau| of one parameter, flat and in float32."""
    theta, other = base.reshape(-1), expert.reshape(-1)
    found = torch.empty(theta.shape, device=base.device)
    for at in slices(theta.numel()):
        found[at] = (wide(other[at]) - wide(theta[at])).abs_()
    return found


class Magnitudes:
    """The k-th largest |tau| of a stream that comes by twice, exactly, in memory that does not grow with it.

    Bit patterns of floats >= 0 are ordered as the floats are: the first pass counts their upper 16 bits, which tells
    the bin that holds the k-th largest; the second counts the lower 16 within it.
    """

    def __init__(self, density: float) -> None:
        self.density = density
        self._upper, self._lower = torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.int64)
        self._bin: int | None = None
        self._rank = 0

    def see(self, tensor: torch.Tensor) -> None:
        """Count the entries of a tensor of any shape, as float32."""
        flat = tensor.reshape(-1)
        for part in slices(flat.numel()):
            bits = flat[part].float().abs().view(torch.int32)
            if self._bin is None:
                self._upper += torch.bincount(bits >> 16, minlength=BINS).cpu()
            else:
                self._lower += torch.bincount(bits[bits >> 16 == self._bin] & 0xFFFF, minlength=BINS).cpu()

    def narrow(self) -> None:
        """End the first pass."""
        self._bin, self._rank = _largest(self._upper, kept(self.density, int(self._upper.sum())))

    def threshold(self) -> float:
        """The least |tau| that stays, after both passes; 0 where there was nothing."""
        assert self._bin is not None and self._lower.sum() == self._upper[self._bin], "the passes saw different entries"
        lower, _ = _largest(self._lower, self._rank)
        return float(torch.tensor(self._bin << 16 | lower, dtype=torch.int32).view(torch.float32))


def global_thresholds(
    vectors: Callable[[], Iterator[Sequence[torch.Tensor]]], num_experts: int, density: float
) -> list[float]:
    """The |tau_i| that an entry of each expert's whole task vector must reach to be among its share `density`.

    `vectors()` starts a pass: for each parameter, or slice of one, the N task vectors. It is called twice.
    """
    magnitudes = [Magnitudes(density) for _ in range(num_experts)]
    for closing in (Magnitudes.narrow, None):
        for tensors in vectors():
            for own, tensor in zip(magnitudes, tensors, strict=True):
                own.see(tensor)
        for own in magnitudes:
            if closing is not None:
                closing(own)
    return [own.threshold() for own in magnitudes]


def task_vectors(base: Weights, experts: Sequence[Weights]) -> Iterator[list[torch.Tensor]]:
    """tau_i of every floating parameter, in slices."""
    for key in base.keys():  # noqa: SIM118 - Weights is no mapping
        if base.dtype(key).is_floating_point:
            wholes = [reader.tensor(key).reshape(-1) for reader in (base, *experts)]
            for at in slices(wholes[0].numel()):
                theta, *others = (wide(computable(whole[at])) for whole in wholes)
                yield [other - theta for other in others]


def _largest(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the entry of that rank from above (1 is the largest), and its rank within the bin."""
    if not rank:
        return 0, 0
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    return len(counts) - 1 - place, rank - int(above[place - 1] if place else 0)
