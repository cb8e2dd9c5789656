"""Weights and task vectors are different types: a weight minus a weight is a task vector, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch


@dataclass(frozen=True, eq=False)
class TaskVector:
    """tau = theta_i - theta of one tensor, in float32 or wider."""

    value: torch.Tensor

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        return TaskVector(self.value + other.value)

    def __mul__(self, factor: float) -> TaskVector:
        if not isinstance(factor, int | float):
            return NotImplemented
        return TaskVector(self.value * factor)

    __rmul__ = __mul__


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor of a model; in float32 or wider while merging."""

    value: torch.Tensor

    def __sub__(self, base: Weight) -> TaskVector:
        if not isinstance(base, Weight):
            return NotImplemented
        return TaskVector(wide(self.value) - wide(base.value))

    def __add__(self, vector: TaskVector) -> Weight:
        if not isinstance(vector, TaskVector):
            return NotImplemented
        return Weight(wide(self.value) + vector.value)


def interpolate(base: Weight, experts: list[Weight], weights: list[float]) -> Weight:
    """(1 - sum w) theta + sum_i w_i theta_i: Eq. 8 without forming the task vectors, in float32 or wider.

    w = 0 gives the base and a one-hot w its expert, to the bit: no term of factor 0 is added.
    """
    factors = [1.0 - math.fsum(weights), *weights]
    terms = (w * wide(part.value) for w, part in zip(factors, [base, *experts], strict=True) if w)
    return Weight(reduce(torch.add, terms))


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def slices(size: int, step: int = 1 << 18) -> Iterator[slice]:
    """[0, size) in pieces that fit a processor's cache."""
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


def finite(tensor: torch.Tensor) -> bool:
    """Whether every entry is: one sum, and a look at each only where that overflows or is not finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    tensor = computable(tensor)
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def computable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or in float32 where it is float8, which torch only stores."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
