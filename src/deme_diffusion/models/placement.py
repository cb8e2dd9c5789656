"""Where projections stand (Sec. 3.2), and into which weights each of them folds.

A place is the name of a submodule. `mid_block`, `down_blocks.i` and `up_blocks.i` are blocks, anything else is an
operation (a convolution or linear layer), so that a file of named matrices says all. A channel-wise projection is named
as its place, a spatial one `<place>|spatial`. What is read from names and shapes alone serves a module in memory and a
streamed checkpoint alike; `shapes` is key -> shape of a component's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import nn

from deme_diffusion.errors import UserError
from deme_diffusion.weight_files import SPATIAL

Shapes = Mapping[str, Sequence[int]]
BLOCK = re.compile(r"(down_blocks|up_blocks)\.\d+|mid_block")
_LAST_CONVOLUTION = re.compile(r"resnets\.(\d+)\.conv2\.weight")


def residual_places(module: nn.Module) -> list[str]:
    """Names of the convolutions and linear layers that end a residual branch, or that resample all of a tensor.

    In a transformer those of both streams, image and text: what comes after them, a gate, scales channel by channel.
    """
    places = [
        f"{name}.{child}"
        for name, block in module.named_modules()
        for kind, children in _ends_of_branches()
        if isinstance(block, kind)
        for child in children
    ]
    modules = dict(module.named_modules())
    return [place for place in places if isinstance(modules.get(place), nn.Conv2d | nn.Linear)]


def _ends_of_branches() -> list[tuple[type[nn.Module], tuple[str, ...]]]:
    """Class of a block -> names of the operations in it that end a branch."""
    from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.transformers.transformer_flux import (
        FluxAttention,
        FluxSingleTransformerBlock,
        FluxTransformerBlock,
    )
    from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
    from diffusers.models.upsampling import Upsample2D

    of_attention, of_both_streams = ("to_out.0", "to_add_out"), ("ff.net.2", "ff_context.net.2")
    return [
        (ResnetBlock2D, ("conv2",)),
        (Attention, of_attention),
        (FluxAttention, of_attention),
        (WanAttention, of_attention),
        (BasicTransformerBlock, ("ff.net.2",)),
        (JointTransformerBlock, of_both_streams),
        (FluxTransformerBlock, of_both_streams),
        (FluxSingleTransformerBlock, ("proj_out",)),
        (WanTransformerBlock, ("ffn.net.2",)),
        (Transformer2DModel, ("proj_out",)),
        (Downsample2D, ("conv",)),
        (Upsample2D, ("conv",)),
    ]


def block_places(module: nn.Module) -> list[str]:
    """The paper's: every down block, the mid block (where there is one) and every up block of a diffusers U-Net.

    Raises UserError for another network.
    """
    places = [name for name, _ in module.named_modules() if BLOCK.fullmatch(name)]
    if not places:
        kind = type(module).__name__
        raise UserError(f"decouple.projection: block is of U-Nets, and a {kind} is none; use residual or none")
    places.sort(key=lambda place: place.split(".")[0])  # down, mid, up, as in the forward
    shapes = shapes_of(module)
    for place in places:
        if width(place, shapes) is None:
            kind = type(module.get_submodule(place)).__name__
            raise UserError(f"decouple.projection: block: {place} is a {kind} without resnets; use residual or none")
    return places


PLACEMENTS: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "none": lambda module: [],
    "residual": residual_places,
    "block": block_places,
}
"""Every placement by its name in `decouple.projection`: module -> names of the places that P follows."""


def projections(module: nn.Module, placement: str, axes: str = "channel") -> list[str]:
    """Names of the projections of a placement; with axes `both`, each place's channel-wise one before its spatial one.

    A linear layer's tokens have no spatial axes, so only blocks and convolutions get a spatial one. Raises UserError
    where no place is left.
    """
    places, shapes = PLACEMENTS[placement](module), shapes_of(module)
    names = {place: (place, f"{place}{SPATIAL}") for place in places}
    wanted = {"channel": slice(0, 1), "spatial": slice(1, 2), "both": slice(0, 2)}[axes]
    found = [name for place in places for name in names[place][wanted] if shape_of(name, shapes) is not None]
    kind = type(module).__name__
    if placement != "none" and not places:
        raise UserError(f"decouple.projection: {placement} finds no place in a {kind}; use none")
    if axes != "channel" and placement != "none" and not any(map(is_spatial, found)):
        raise UserError(
            f"decouple.projection_axes: {axes}: no convolution among the places of {placement} in a {kind}; use channel"
        )
    return found


def is_spatial(name: str) -> bool:
    """Whether a projection is a depthwise convolution D_s, by its name; else it is a matrix D over channels."""
    return name.endswith(SPATIAL)


def place_of(name: str) -> str:
    """The place that a projection follows."""
    return name.removesuffix(SPATIAL)


def weighted_as(name: str) -> str:
    """Name of the parameter whose merge weights a projection has that stays beside the weights."""
    return f"{place_of(name)}.weight"


def is_block(name: str) -> bool:
    """Whether a projection follows a whole block, by its name; else it follows an operation."""
    return BLOCK.fullmatch(place_of(name)) is not None


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a module's tensors."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def width(place: str, shapes: Shapes) -> int | None:
    """C at a place: channels of what an operation gives, or of a block's hidden states; None where nothing is."""
    key = f"{_last_resnet(place, shapes)}.conv2.weight" if is_block(place) else f"{place}.weight"
    return shapes[key][0] if len(shapes.get(key, ())) > 1 else None  # a norm's weight has one axis, and mixes nothing


def shape_of(name: str, shapes: Shapes) -> tuple[int, ...] | None:
    """(C, C) of a channel-wise projection, (C, 1, 3, 3) of a spatial one; None where the model has no such place."""
    place = place_of(name)
    channels = width(place, shapes)
    if channels is None or not is_spatial(name):
        return None if channels is None else (channels, channels)
    flat = not is_block(place) and len(shapes[f"{place}.weight"]) != 4
    return None if flat else (channels, 1, 3, 3)


def folding(names: Collection[str], keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Name -> the operations that each of a model's projections folds into, in the order in which they act; or none.

    A spatial one never folds: a depthwise 3x3 after a convolution is a larger kernel, and another one at the borders.
    Nor does a block's where one that stays acts between it and the operation, since the two do not commute.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(names, key=lambda name: (is_block(name), name)):
        onto = () if is_spatial(name) else operations(name, keys)
        between = is_block(name) and any(f"{operation}{SPATIAL}" in names for operation in onto)
        found[name] = () if between else onto
    return found


def operations(place: str, keys: Collection[str]) -> tuple[str, ...]:
    """The operations whose weights and biases become P K and P b; none where P folds into no weight.

    A block's P folds exactly where its hidden states are one linear operation's output, and no skip connection sees
    them: up blocks that end in an upsampling convolution, or in a resnet whose shortcut is a convolution as well. Every
    other block adds an input of its own, which skip connections see unprojected.
    """
    if not is_block(place):
        return (place,)
    if not place.startswith("up_blocks."):
        return ()
    inside = {key.removeprefix(f"{place}.") for key in keys if key.startswith(f"{place}.")}
    children = {name.split(".")[0] for name in inside}
    if "upsamplers" in children:
        # A resnet in its place has no `conv`; blocks with further children (skip_conv, ...) read the states elsewhere.
        ends = children <= {"resnets", "attentions", "upsamplers"} and "upsamplers.0.conv.weight" in inside
        return (f"{place}.upsamplers.0.conv",) if ends else ()
    last = _last_resnet(place, keys)
    ends = children == {"resnets"} and f"{last}.conv_shortcut.weight" in keys
    return (f"{last}.conv2", f"{last}.conv_shortcut") if ends else ()


def foldable(module: nn.Module, placement: str = "block") -> dict[str, bool]:
    """Place -> whether P folds into the weights there, for a whole model (on the meta device as well)."""
    keys = module.state_dict().keys()
    return {place: bool(operations(place, keys)) for place in PLACEMENTS[placement](module)}


def _last_resnet(block: str, keys: Collection[str]) -> str:
    """Name of a block's last resnet, or of one that does not exist."""
    inside = (key.removeprefix(f"{block}.") for key in keys if key.startswith(f"{block}."))
    found = [int(match[1]) for name in inside if (match := _LAST_CONVOLUTION.fullmatch(name))]
    return f"{block}.resnets.{max(found, default=-1)}"
