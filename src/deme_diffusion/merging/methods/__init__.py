"""Merge methods: pure functions over the tensors of one parameter. `merging.table` says what each is and takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module

import torch

from deme_diffusion.config import MethodOptions
from deme_diffusion.merging.table import method
from deme_diffusion.merging.vectors import Weight, wide


@dataclass(frozen=True, eq=False)
class Parameter:
    """What a method sees of one parameter: theta, every theta_i, w_i, all tensors of one shape.

    `options` are resolved: none that the method takes is None, but TSV's rank. `thresholds`: of TIES with trim=global,
    the |tau_i| that an entry must reach. `fisher`: of the Fisher method, the diagonal information F_i, shaped as theta.
    `name` keys random masks, so that they depend on no order of the parameters.
    """

    name: str
    base: Weight
    experts: Sequence[Weight]
    weights: Sequence[float]
    options: MethodOptions = field(default_factory=MethodOptions)
    thresholds: Sequence[float] | None = None
    fisher: Sequence[torch.Tensor] | None = None

    def vector(self, i: int) -> torch.Tensor:
        """tau_i = theta_i - theta, contiguous, made anew at each call: a method holds as many as it needs."""
        return (self.experts[i] - self.base).value.contiguous()

    def start(self) -> torch.Tensor:
        """A copy of theta to add to, contiguous, in the widest dtype of all."""
        dtype = torch.float32
        for part in (self.base, *self.experts):
            dtype = torch.promote_types(dtype, part.value.dtype)
        return wide(self.base.value).to(dtype, copy=True).contiguous()


Merge = Callable[[Parameter], Weight]


def function(name: str) -> Merge:
    """The function of a method. Raises UserError for an unknown name."""
    merge: Merge = getattr(import_module(f"{__name__}.{method(name).module}"), name)
    return merge
