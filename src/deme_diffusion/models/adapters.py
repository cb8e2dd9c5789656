"""A routed ensemble of LoRA experts: one base in memory, and N adapters in it of which one acts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from deme_diffusion.division import Division
from deme_diffusion.lora import Lora
from deme_diffusion.models.ensemble import RoutedEnsemble
from deme_diffusion.models.lora import attach, choose


class SwitchedEnsemble(RoutedEnsemble):
    """`RoutedEnsemble`, whose experts are adapters of `base`, which is changed in place."""

    def __init__(
        self,
        base: nn.Module,
        loras: Sequence[Lora],
        division: Division,
        index: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        for i, lora in enumerate(loras):
            attach(base, lora, _name(i))
        self._acting = -1
        super().__init__([lambda: base] * len(loras), division, index, resident=1)

    def expert(self, i: int) -> nn.Module:
        """The base with the adapter of expert i acting, and no other."""
        if not self._experts:
            self._experts[0] = self._loaders[0]()
        base = self._experts[0]
        if i != self._acting:
            choose(base, _name(i))
            self._acting = i
        return base


def _name(i: int) -> str:
    return f"expert_{i}"
