"""Merge methods: pure functions over the tensors of one parameter. `merging.table` says what each is and takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module

import torch

from deme_diffusion.config import MethodOptions
from deme_diffusion.merging.table import method
from deme_diffusion.merging.vectors import Weight, wide

Thresholds = tuple[float, ...]
"""Of one task vector: of TIES the least |tau_i| that stays, of Breadcrumbs the least and the largest."""


@dataclass(frozen=True, eq=False)
class Parameter:
    """What a method sees of one parameter, or of a slice of it: theta, every theta_i, w_i, all tensors of one shape.

    `options` are resolved: none that the method takes is None, but TSV's rank. `thresholds`: what a method that needs
    them knows of each whole |tau_i| already (`thresholds_of`). `fisher`: of the Fisher method, the diagonal information
    F_i, shaped as theta. `name` keys random masks, so that they depend on no order of the parameters; `first` is the
    place in the whole parameter of a slice's first entry.
    """

    name: str
    base: Weight
    experts: Sequence[Weight]
    weights: Sequence[float]
    options: MethodOptions = field(default_factory=MethodOptions)
    thresholds: Sequence[Thresholds] | None = None
    fisher: Sequence[torch.Tensor] | None = None
    first: int = 0

    def vector(self, i: int) -> torch.Tensor:
        """tau_i = theta_i - theta, contiguous, made anew at each call: a method holds as many as it needs."""
        return (self.experts[i] - self.base).value.contiguous()

    def entries(self, i: int, at: slice) -> torch.Tensor:
        """tau_i of the flat entries `at`, made anew."""
        return (Weight(self.experts[i].value.reshape(-1)[at]) - Weight(self.base.value.reshape(-1)[at])).value

    def start(self) -> torch.Tensor:
        """A copy of theta to add to, contiguous, in the widest dtype of all."""
        dtype = torch.float32
        for part in (self.base, *self.experts):
            dtype = torch.promote_types(dtype, part.value.dtype)
        return wide(self.base.value).to(dtype, copy=True).contiguous()


Merge = Callable[[Parameter], Weight]
Look = Callable[[torch.Tensor, MethodOptions], Thresholds]


def function(name: str) -> Merge:
    """The function of a method. Raises UserError for an unknown name."""
    merge: Merge = getattr(import_module(f"{__name__}.{method(name).module}"), name)
    return merge


def thresholds_of(name: str) -> Look:
    """What finds a method's thresholds in all of one |tau_i|, flat and in float32, which it may overwrite."""
    look: Look = getattr(import_module(f"{__name__}.{method(name).module}"), f"{name}_thresholds")
    return look
