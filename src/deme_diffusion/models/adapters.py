"""A routed ensemble of LoRA experts: one base in memory, and N adapters in it of which one acts at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from deme_diffusion.division import Division
from deme_diffusion.lora import Lora
from deme_diffusion.models.ensemble import RoutedEnsemble
from deme_diffusion.models.lora import attach, choose, choose_none, take_out


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


@contextmanager
def in_turn(base: nn.Module, loras: Sequence[Lora]) -> Iterator[list[Callable[[], nn.Module]]]:
    """While the block runs: the base, and the base with each adapter acting alone, as functions that switch to it.

    All adapters are in `base` itself, and out of it afterwards.
    """
    try:
        for i, lora in enumerate(loras):
            attach(base, lora, _name(i))
        choose_none(base)  # who reads the base itself before the first turn gets the base
        yield [partial(choose_none, base), *(partial(choose, base, _name(i)) for i in range(len(loras)))]
    finally:
        take_out(base)


def _name(i: int) -> str:
    return f"expert_{i}"
