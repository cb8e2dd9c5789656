"""Weights and task vectors are different types: a weight minus a weight is a task vector, and nothing else is."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class TaskVector:
    """tau = theta_i - theta of one tensor, in float32."""

    value: torch.Tensor

    def __add__(self, other: TaskVector) -> TaskVector:
        return TaskVector(self.value + other.value)

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector(self.value * factor)

    __rmul__ = __mul__


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor of a model, in float32 while merging."""

    value: torch.Tensor

    def __sub__(self, base: Weight) -> TaskVector:
        return TaskVector(self.value.float() - base.value.float())

    def __add__(self, vector: TaskVector) -> Weight:
        return Weight(self.value.float() + vector.value)


def interpolate(base: Weight, experts: list[Weight], weights: list[float]) -> Weight:
    """(1 - sum w) theta + sum_i w_i theta_i: Eq. 8 without forming the task vectors, accumulated in float32.

    w = 0 gives the base and a one-hot w its expert, to the bit.
    """
    result = base.value.float() * (1.0 - sum(weights))
    for expert, weight in zip(experts, weights, strict=True):
        if weight:
            result += expert.value.float() * weight
    return Weight(result)
