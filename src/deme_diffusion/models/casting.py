"""A component that computes in one precision, in a pipeline of another: a bfloat16 model and a float32 decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deme_diffusion.models.precision import computes_in


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `dtype`, also those within dicts, lists and tuples; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)({key: in_dtype(item, dtype) for key, item in value.items()})
    if type(value) in (list, tuple):
        return type(value)(in_dtype(item, dtype) for item in value)
    return value


class Cast(nn.Module):
    """A component as one of `dtype`: what it gets is cast to what it computes in, and what it answers back.

    Timesteps stay as they are: 999.5 is none of bfloat16's numbers. Other attributes are the component's.
    """

    def __init__(self, component: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.component, self.dtype = component, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The component's forward."""
        own = computes_in(self.component)
        cast = [args[0].to(own), *args[1:2], *in_dtype(args[2:], own)] if args else []
        named = {key: value if key == "timestep" else in_dtype(value, own) for key, value in kwargs.items()}
        return in_dtype(self.component(*cast, **named), self.dtype)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(super().__getattr__("component"), name)
