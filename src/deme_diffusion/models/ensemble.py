"""The timestep-routed ensemble, the paper's "before merge" (Eq. 7): at timestep t the expert that serves t answers."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from deme_diffusion.division import Division

SHARED = ("txt_ids", "img_ids", "image_rotary_emb")
"""Conditions without an axis of samples, which may be as long as a batch by chance."""


class RoutedEnsemble(nn.Module):
    """N experts behind the forward of one component; at most `resident` of them are in memory.

    `loaders[i]()` gives expert i in eval mode; `index` maps what a forward gets as timestep to 0..T-1. Attributes that
    are not the ensemble's own (`config`, `dtype`, ...) are those of the expert that is resident. A batch of mixed
    timesteps is answered expert by expert.

    A pipeline that rounds timesteps, as Flux's in bfloat16, routes near an edge otherwise than it steps, unless `index`
    undoes it: of 1000 timesteps and 4 uniform ranges, 2 go astray. `FlowDenoiser.index` undoes it in `generate`.
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The component's forward; its timestep is a number, or a tensor of shape (), (b,) or (b, tokens)."""
        sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        place = None if "timestep" in kwargs else self._place_of_timestep()
        timestep = kwargs["timestep"] if place is None else args[place]
        assert sample is not None, "a component is asked about sample or hidden_states"
        t = torch.as_tensor(timestep, device=sample.device)
        # Of a video that begins with a given image, that image's tokens are asked about at 0: the noisiest decides.
        each = (t.flatten(1).amax(1) if t.ndim > 1 else t).expand(len(sample))
        owner = self.route[self._index(each)]
        experts = owner.unique().tolist()
        if len(experts) == 1:
            return self.expert(experts[0])(*args, **kwargs)
        t = t.expand(len(sample)) if t.ndim < 2 else t
        if place is None:
            kwargs = {**kwargs, "timestep": t}
        else:
            args = (*args[:place], t, *args[place + 1 :])
        return self._mixed(owner, experts, args, kwargs)

    def _mixed(self, owner: torch.Tensor, experts: Sequence[int], args: Any, kwargs: dict[str, Any]) -> Any:
        """The answer of each sample's expert, as the component gives it: its output object, or a tuple."""
        answer: torch.Tensor | None = None
        for i in experts:
            mine = owner == i
            found = self.expert(i)(*_rows(args, mine), **_rows(kwargs, mine))
            rows = found[0]
            answer = rows.new_empty((len(owner), *rows.shape[1:])) if answer is None else answer
            answer[mine] = rows
        return (answer,) if type(found) is tuple else type(found)(sample=answer)

    def _place_of_timestep(self) -> int:
        """Where a forward that is called without the keyword has it: second, if its names do not say."""
        forward = next(reversed(self._experts.values())).forward
        names = list(inspect.signature(forward).parameters)
        return names.index("timestep") if "timestep" in names else 1

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


def _rows(value: Any, mine: torch.Tensor, name: str = "") -> Any:
    """The rows of what goes with some samples, also within dicts, lists and tuples; what has no row a sample, whole."""
    if isinstance(value, torch.Tensor):
        return value[mine] if value.shape[:1] == mine.shape and name not in SHARED else value
    if isinstance(value, dict):
        return {key: _rows(item, mine, key) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rows(item, mine) for item in value)
    return value
