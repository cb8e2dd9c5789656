"""Channel-wise projections P = I + D (Sec. 3.2): attached from outside by hooks, folded into the weights.

D starts at 0 and lives in `projection.safetensors` beside stock-shaped weights; absent means 0. In the `residual`
placement P follows operations whose output is only ever added to something, or passed on whole, so P K folds exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.weights import State, load_state, save_state

FILE = "projection.safetensors"


def residual_places(module: nn.Module) -> list[str]:
    """Names of the convolutions and linear layers that end a residual branch, or that resample all of a tensor."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    last = (
        (ResnetBlock2D, "conv2"),
        (Attention, "to_out.0"),
        (Transformer2DModel, "proj_out"),
        (Downsample2D, "conv"),
        (Upsample2D, "conv"),
    )
    places = [
        f"{name}.{child}" for name, block in module.named_modules() for kind, child in last if isinstance(block, kind)
    ]
    modules = dict(module.named_modules())
    return [place for place in places if isinstance(modules.get(place), nn.Conv2d | nn.Linear)]


PLACEMENTS = {"none": lambda module: [], "residual": residual_places}
"""Every placement by its name in `decouple.projection`: module -> names of the operations that P follows."""


class Projection(nn.Module):
    """The matrices D of one model, (C, C) each, all 0 at first."""

    def __init__(self, module: nn.Module, places: list[str]) -> None:
        super().__init__()
        self.places = places
        modules = dict(module.named_modules())
        self.matrices = nn.ParameterList(_zeros_for(modules[place]) for place in places)

    def state(self) -> State:
        """Place -> D, as it stands in `projection.safetensors`."""
        return {place: matrix.detach().clone() for place, matrix in zip(self.places, self.matrices, strict=True)}


class Projected(nn.Module):
    """A component whose projections act: forward, config and names are the component's own."""

    def __init__(self, module: nn.Module, placement: str) -> None:
        super().__init__()
        if placement not in PLACEMENTS:
            raise UserError(f"decouple.projection: unknown placement {placement!r}{nearest(placement, PLACEMENTS)}")
        places = PLACEMENTS[placement](module)
        if placement != "none" and not places:
            raise UserError(f"decouple.projection: {placement} finds no place in a {type(module).__name__}; use none")
        self.component, self.projection = module, Projection(module, places)
        attach(module, self.projection)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.component(*args, **kwargs)


def attach(module: nn.Module, projection: Projection) -> None:
    """Make each place's output y become y + D y, from outside the module."""
    modules = dict(module.named_modules())
    for place, matrix in zip(projection.places, projection.matrices, strict=True):
        modules[place].register_forward_hook(_hook(matrix))


def fold(weights: Mapping[str, torch.Tensor], matrices: Mapping[str, torch.Tensor]) -> State:
    """K' = (I + D) K and b' = (I + D) b for every place; the other tensors as they are."""
    folded = dict(weights)
    for place, matrix in matrices.items():
        for name in (f"{place}.weight", f"{place}.bias"):
            if name in folded:
                folded[name] = fold_tensor(folded[name], matrix)
    return folded


def fold_tensor(tensor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(I + D) K of one weight (out, ...) or bias (out,), with D (out, out); the tensor's dtype."""
    flat = tensor.reshape(tensor.shape[0], -1)
    return (flat + matrix.to(flat.dtype) @ flat).reshape(tensor.shape)


def save(folder: Path, matrices: Mapping[str, torch.Tensor]) -> None:
    """Write the matrices beside the weights; none, no file."""
    if matrices:
        save_state(folder / FILE, matrices)


def load(folder: Path) -> State:
    """The matrices beside a component's weights; an absent file means D = 0 everywhere."""
    return load_state(folder / FILE) if (folder / FILE).is_file() else {}


def fold_into(module: nn.Module, folder: Path) -> nn.Module:
    """The module with the projections of `folder` folded into its weights, in place."""
    matrices = load(folder)
    module.load_state_dict(fold(module.state_dict(), matrices))
    return module


def _zeros_for(operation: nn.Module) -> nn.Parameter:
    weight: Any = operation.weight
    return nn.Parameter(torch.zeros(weight.shape[0], weight.shape[0], dtype=weight.dtype, device=weight.device))


def _hook(matrix: nn.Parameter) -> Any:
    def project(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if isinstance(module, nn.Conv2d):
            return output + F.conv2d(output, matrix[:, :, None, None])
        return output + F.linear(output, matrix)

    return project
