"""Projections P = I + D (Sec. 3.2): attached from outside by hooks, folded into the weights where exact.

Channel-wise, P y = y + D y with D (C, C); spatial, y + the depthwise 3x3 convolution of y by D_s (C, 1, 3, 3), padded
with zeros, which never folds. Where a place has both, the channel-wise one acts first. D below is either: it starts at
0 and lives in `projection.safetensors` beside stock-shaped weights; absent means 0. In the `residual` placement P
follows operations whose output is only ever added to something, or passed on whole, so P K folds exactly. In the
paper's, `block`, some places fold and the others stay: a small extra module, which `attach_projection` loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.models.placement import (
    PLACEMENTS,
    Shapes,
    folding,
    is_spatial,
    place_of,
    projections,
    shape_of,
    shapes_of,
)
from deme_diffusion.weight_files import NO_BASE, PROJECTIONS, SPATIAL
from deme_diffusion.weights import State, load_state, save_state

FILE = PROJECTIONS
COMPONENTS = ("unet", "transformer")
"""Folders of a pipeline in which `attach_projection` looks."""
_BUFFERS = {"": "channel_projection", SPATIAL: "spatial_projection"}
"""What follows the place in a projection's name -> buffer of the module there; in the order in which they act."""


class Projection(nn.Module):
    """The D of one model by name (`placement.projections`), all 0 at first."""

    def __init__(self, module: nn.Module, places: list[str]) -> None:
        super().__init__()
        self.places = places
        shapes = shapes_of(module)
        parts = [module.get_submodule(place_of(name)) for name in places]
        self.matrices = nn.ParameterList(
            _zeros_for(part, shape_of(name, shapes)) for name, part in zip(places, parts, strict=True)
        )

    def state(self) -> State:
        """Name -> D, as it stands in `projection.safetensors`."""
        return {place: matrix.detach().clone() for place, matrix in zip(self.places, self.matrices, strict=True)}


class Projected(nn.Module):
    """A component whose projections act and are trained: forward, config and names are the component's own."""

    def __init__(self, module: nn.Module, placement: str, axes: str = "channel") -> None:
        super().__init__()
        if placement not in PLACEMENTS:
            raise UserError(f"decouple.projection: unknown placement {placement!r}{nearest(placement, PLACEMENTS)}")
        names = projections(module, placement, axes)
        self.component, self.projection = module, Projection(module, names)
        for name, matrix in zip(names, self.projection.matrices, strict=True):
            module.get_submodule(place_of(name)).register_forward_hook(_hook(matrix))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.component(*args, **kwargs)


# -- folding ---------------------------------------------------------------------------------------


def fold(weights: Mapping[str, torch.Tensor], matrices: Mapping[str, torch.Tensor]) -> State:
    """K' = (I + D) K and b' = (I + D) b for every place; the other tensors as they are.

    Raises ValueError for a place that folds into no weight (`placement.folding`).
    """
    folded = dict(weights)
    for place, onto in folding(matrices, weights.keys()).items():
        if not onto:
            raise ValueError(f"{place}: a projection there folds into no weight")
        for name in (f"{operation}.{kind}" for operation in onto for kind in ("weight", "bias")):
            if name in folded:
                folded[name] = fold_tensor(folded[name], matrices[place])
    return folded


def fold_tensor(tensor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(I + D) K of one weight (out, ...) or bias (out,), with D (out, out); the tensor's dtype."""
    flat = tensor.reshape(tensor.shape[0], -1)
    return (flat + matrix.to(flat.dtype) @ flat).reshape(tensor.shape)


def fold_into(module: nn.Module, folder: Path) -> nn.Module:
    """The module with the projections of `folder`, in place: folded where that is exact, attached where it is not."""
    matrices, shapes = load(folder), shapes_of(module)
    check_fits(matrices, shapes, folder / FILE, f"the {type(module).__name__}")
    onto = folding(matrices, shapes)
    folds = {place: matrix for place, matrix in matrices.items() if onto[place]}
    module.load_state_dict(fold(module.state_dict(), folds))
    return attach(module, {place: matrix for place, matrix in matrices.items() if place not in folds})


# -- what does not fold ----------------------------------------------------------------------------


def attach_projection(component: nn.Module, folder: str | Path) -> nn.Module:
    """Make the projections saved in a pipeline's or a component's folder act on the loaded component, and return it.

    They move with `component.to(...)`, and stay out of its state: `save_pretrained` writes the stock weights only.
    Raises UserError where the folder has none, they do not fit, or projections are attached already.
    """
    path, name = _file(Path(folder)), type(component).__name__
    if attached(component):
        raise UserError(f"{path}: projections are attached to this {name} already; load it anew to attach others")
    matrices = load_state(path)
    check_fits(matrices, shapes_of(component), path, f"the {name}")
    return attach(component, matrices)


def attach(module: nn.Module, matrices: Mapping[str, torch.Tensor]) -> nn.Module:
    """The module with exactly these projections attached, in place: those of an earlier call are gone."""
    for other in module.modules():
        other._buffers.update({buffer: None for buffer in _BUFFERS.values() if buffer in other._buffers})
    for name, matrix in matrices.items():
        target = module.get_submodule(place_of(name))
        like = next(target.parameters())
        if not any(buffer in target._buffers for buffer in _BUFFERS.values()):
            target.register_forward_hook(_project_by_buffers)
        # Not persistent: the state keeps the stock keys.
        own = matrix.detach().to(like.device, like.dtype, copy=True)
        target.register_buffer(_buffer(name), own, persistent=False)
    return module


def attached(module: nn.Module) -> State:
    """Name -> D as attached to a module; empty for a stock one."""
    parts = [(f"{place}{kind}", part._buffers.get(buffer)) for place, part in module.named_modules()
             for kind, buffer in _BUFFERS.items()]  # fmt: skip
    return {name: matrix for name, matrix in parts if matrix is not None}


def extra_parameters(module: nn.Module) -> int:
    """Numbers that attached projections add to the module's own parameters."""
    return sum(matrix.numel() for matrix in attached(module).values())


# -- files -----------------------------------------------------------------------------------------


def save(folder: Path, matrices: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the matrices beside the weights; none, no file."""
    if matrices:
        save_state(folder / FILE, matrices, metadata)


def load(folder: Path) -> State:
    """The matrices beside a component's weights; an absent file means D = 0 everywhere."""
    return load_state(folder / FILE) if (folder / FILE).is_file() else {}


def check_fits(matrices: Mapping[str, torch.Tensor], shapes: Shapes, path: Path, model: str) -> None:
    """Raises UserError unless every D of the file has a place in the model, and its channels."""
    for name, matrix in matrices.items():
        shape, place = shape_of(name, shapes), place_of(name)
        if shape is None:
            known = {key.rpartition(".")[0] for key in shapes}
            what = "no convolution or block" if is_spatial(name) else "no operation or block"
            raise UserError(f"{path}: {place} is {what} of {model}{nearest(place, known)}")
        if tuple(matrix.shape) != shape:
            wants = f", which asks for {shape}" if is_spatial(name) else ""
            raise UserError(
                f"{path}: {name} is {tuple(matrix.shape)}, but {model} has {shape[0]} channels there{wants}"
            )


def refuse_beside(component: Path) -> None:
    """Raises UserError for a base with projections beside its weights: only stock models are finetuned or merged."""
    if (component / FILE).is_file():
        raise UserError(f"{component / FILE}: {NO_BASE}")


def _file(folder: Path) -> Path:
    files = [part / FILE for part in (folder, *(folder / name for name in COMPONENTS))]
    found = [path for path in files if path.is_file()]
    if not found:
        what = "no such folder" if not folder.is_dir() else f"no {FILE}; a model without one is whole as it is"
        raise UserError(f"{folder}: {what}")
    return found[0]


def buffer_of(name: str) -> str:
    """Name of the buffer that holds an attached D: what `torch.func` differentiates by."""
    return f"{place_of(name)}.{_buffer(name)}"


def _buffer(name: str) -> str:
    return _BUFFERS[SPATIAL if is_spatial(name) else ""]


# -- y + D y ---------------------------------------------------------------------------------------


def _zeros_for(place: nn.Module, shape: tuple[int, ...] | None) -> nn.Parameter:
    like = next(place.parameters())
    assert shape is not None, "a placement names places that have channels"
    return nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))


def _hook(matrix: nn.Parameter) -> Any:
    return lambda module, inputs, output: _project(module, output, matrix)


def _project_by_buffers(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A hook without memory, so that a copied module has matrices of its own."""
    for buffer in _BUFFERS.values():
        if (matrix := module._buffers.get(buffer)) is not None:
            output = _project(module, output, matrix)
    return output


def _project(module: nn.Module, output: Any, matrix: torch.Tensor) -> Any:
    """y + D y; of a block that gives skip tensors as well, only the hidden states, which come first, are projected."""
    if isinstance(output, tuple):
        return (_project(module, output[0], matrix), *output[1:])
    if matrix.ndim == 4:
        return output + F.conv2d(output, matrix, padding=1, groups=len(matrix))
    if isinstance(module, nn.Linear):
        return output + F.linear(output, matrix)
    return output + F.conv2d(output, matrix[:, :, None, None])
