"""The timestep-routed ensemble, the paper's "before merge" (Eq. 7): at timestep t the expert that serves t answers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from deme_diffusion.division import Division


class RoutedEnsemble(nn.Module):
    """N experts behind the forward of one component; at most `resident` of them are in memory.

    `loaders[i]()` gives expert i in eval mode; `index` maps what a forward gets as timestep to 0..T-1. Attributes that
    are not the ensemble's own (`config`, `dtype`, ...) are those of the expert that is resident. A batch of mixed
    timesteps is answered expert by expert.
    """

    def __init__(
        self,
        loaders: Sequence[Callable[[], nn.Module]],
        division: Division,
        index: Callable[[torch.Tensor], torch.Tensor],
        *,
        resident: int = 8,
    ) -> None:
        super().__init__()
        if len(loaders) != division.num_experts:
            raise ValueError(f"{len(loaders)} experts for a division into {division.num_experts}")
        self._loaders, self._index, self._resident = list(loaders), index, max(1, resident)
        self._experts: OrderedDict[int, nn.Module] = OrderedDict()
        self._placed: dict[str, Any] = {}  # the device and dtype that experts loaded later get as well
        self.register_buffer("route", torch.from_numpy(division.route), persistent=False)
        self.expert(0)

    def expert(self, i: int) -> nn.Module:
        """Expert i, loaded when it is not in memory; the one used longest ago makes room."""
        if i not in self._experts:
            while len(self._experts) >= self._resident:
                self._experts.popitem(last=False)
            self._experts[i] = self._placed_like_the_others(self._loaders[i]())
        self._experts.move_to_end(i)
        return self._experts[i]

    def _placed_like_the_others(self, expert: nn.Module) -> nn.Module:
        parameter = next(expert.parameters(), None)
        wanted = {key: value for key, value in self._placed.items() if getattr(parameter, key, value) != value}
        return expert.to(**wanted) if wanted else expert  # diffusers comments on every change of dtype

    def forward(self, sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """The component's forward; `timestep` is a number, or a tensor of shape () or (b,)."""
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        owner = self.route[self._index(t)]
        experts = owner.unique().tolist()
        if len(experts) == 1:
            return self.expert(experts[0])(sample, timestep, *args, **kwargs)
        tuples = kwargs.pop("return_dict", True) is False
        answer = torch.empty_like(sample)
        for i in experts:
            mine = owner == i
            rest = [_rows(value, mine) for value in args]
            named = {key: _rows(value, mine) for key, value in kwargs.items()}
            answer[mine] = self.expert(i)(sample[mine], t[mine], *rest, return_dict=False, **named)[0]
        return (answer,) if tuples else type(self).output(answer)

    @staticmethod
    def output(sample: torch.Tensor) -> Any:
        """diffusers' output object for a mixed batch."""
        from diffusers.models.unets.unet_2d import UNet2DOutput

        return UNet2DOutput(sample=sample)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedEnsemble:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self._experts.values():
            module._apply(fn)  # type: ignore[no-untyped-call]
        resident = next(self.parameters())
        self._placed = {"device": resident.device, "dtype": resident.dtype}
        return self

    def parameters(self, recurse: bool = True) -> Any:
        """Parameters of the experts in memory."""
        for module in self._experts.values():
            yield from module.parameters(recurse)

    def buffers(self, recurse: bool = True) -> Any:
        """The ensemble's own, and those of the experts in memory, such as attached projections."""
        yield from super().buffers(recurse)
        for module in self._experts.values():
            yield from module.buffers(recurse)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts = self.__dict__.get("_experts")
            if name.startswith("_") or not experts:
                raise
            return getattr(next(reversed(experts.values())), name)


def _rows(value: Any, mine: torch.Tensor) -> Any:
    """The rows of a condition that go with some samples; what is no tensor of a row a sample goes whole."""
    return value[mine] if torch.is_tensor(value) and value.shape[:1] == mine.shape else value
