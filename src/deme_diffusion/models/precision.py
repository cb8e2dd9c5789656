"""In which floating-point type a module is held: what it takes, and how a copy of it is made in another."""

from __future__ import annotations

import copy

import torch
from torch import nn


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or in the float64 that it is in already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def computes_in(module: nn.Module) -> torch.dtype:
    """The type of a module's inputs: that of its weights, those apart that diffusers keeps in float32."""
    for wrapped in ("module", "component"):  # torch's for several processes, `projection.Projected`
        module = getattr(module, wrapped, module)
    own = getattr(module, "dtype", None)  # diffusers': an ensemble hands on its expert's
    return own if isinstance(own, torch.dtype) else next(module.parameters()).dtype


def held_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in place, as diffusers loads it in `dtype`: some classes keep norms and embeddings of time in float32.

    What stands in no checkpoint, such as tables of positions, stays as it was made.
    """
    kept = _kept_in_float32(module)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if any(part in name for part in kept) else dtype)
    return module


def widened(module: nn.Module) -> nn.Module:
    """The module in place, in float32; what is in float64 stays."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = wide(tensor.data)
    return module


def in_float32(module: nn.Module) -> nn.Module:
    """A module in half precision as a copy in float32; any other one itself."""
    return widened(copy.deepcopy(module)) if computes_in(module).itemsize < 4 else module


def _kept_in_float32(module: nn.Module) -> tuple[str, ...]:
    """Parts of the names of what the module's class keeps in float32."""
    found = (getattr(part, "_keep_in_fp32_modules", None) for part in module.modules())
    return tuple(next(filter(None, found), ()))
