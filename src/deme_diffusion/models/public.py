"""The paper's public checkpoints: diffusers' old attention names, and P = I + D as `adapter_list.i.weight`.

The public code keeps a convolution (C, C, 1, 1) without bias after every down block, the mid block and every up block,
in this order, and passes over blocks with a `skip_conv`; skip connections carry the unprojected tensors. That is our
placement `block`. Only their `UNet2DModel` has them.

Between P and D only the diagonal changes. P -> D -> P gives the same bits where the diagonal lies in [0.5, 2] (P - 1 is
exact there: Sterbenz 1974), and half a unit in the last place of P - 1 elsewhere; D -> P -> D loses half of 1 + D's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.models.placement import BLOCK, Shapes, width
from deme_diffusion.weights import State, modern_name

PUBLIC_WIDTHS = (128, 128, 256, 256, 512, 512, 512, 512, 512, 256, 256, 128, 128)
"""C of the adapters that the public code's `add_adapters` makes, whatever the model (LSUN at 256 pixels)."""
_ADAPTERS, _ADAPTER = "adapter_list.", re.compile(r"adapter_list\.(\d+)\.weight")
_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_MODERN = re.compile(r"\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)$")
_PLAIN = {"downsample_type": "conv", "upsample_type": "conv", "mid_block_type": "UNetMidBlock2D"}
"""Options of today's `UNet2DModel` that the public code's lacks: what it does always."""
_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


def old_name(key: str) -> str:
    """The inverse of `modern_name`: diffusers' attention names of 2022."""
    return _MODERN.sub(lambda found: f".{_OLD[found[1]]}.{found[2]}", key)


def adapted_blocks(shapes: Shapes, config: Mapping[str, Any]) -> list[str]:
    """The blocks that `adapter_list` follows, in its order, by a U-Net's key -> shape and its config."""
    kinds = {
        f"{side}.{i}": kind
        for side, option in (("down_blocks", "down_block_types"), ("up_blocks", "up_block_types"))
        for i, kind in enumerate(config.get(option) or ())
    }
    blocks = {found[0] for key in shapes if (found := BLOCK.match(key))}
    return sorted((block for block in blocks if "Skip" not in kinds.get(block, "")), key=_in_the_forward)


def _in_the_forward(block: str) -> tuple[int, int]:
    side, _, index = block.partition(".")
    return _ORDER[side], int(index or 0)


def read_public(
    state: Mapping[str, torch.Tensor], shapes: Shapes, config: Mapping[str, Any], *, file: Path, like: str
) -> tuple[State, State]:
    """Weights by the names that `from_pretrained` gives, and place -> D where D is not 0; only D are copies.

    `shapes`: what the weights must be. Raises UserError where keys, shapes or the adapters do not fit `like`.
    """
    weights, adapters = State(), State()
    for key, tensor in state.items():
        kind, name = (adapters, key) if key.startswith(_ADAPTERS) else (weights, modern_name(key))
        if name in kind:
            raise UserError(f"{file}: {name} is there twice, under its old name and its new one")
        kind[name] = tensor
    _check_shapes(weights, shapes, file, like)
    matrices = _matrices(adapters, adapted_blocks(shapes, config), shapes, file, like) if adapters else {}
    return weights, {place: matrix for place, matrix in matrices.items() if matrix.count_nonzero()}


def _check_shapes(weights: State, shapes: Shapes, file: Path, like: str) -> None:
    missing, extra = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or extra:
        listed = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if keys[3:] else ''})"
            for what, keys in (("missing", missing), ("extra", extra))
            if keys
        )
        hint = nearest(extra[0], missing or shapes) if extra else ""
        raise UserError(f"{file}: keys differ from {like}: {listed}{hint}")
    wrong = [key for key in shapes if tuple(weights[key].shape) != tuple(shapes[key])]
    if wrong:
        key, more = wrong[0], f" ({len(wrong)} tensors differ)" if wrong[1:] else ""
        raise UserError(f"{file}: {key} has shape {tuple(weights[key].shape)}, {like} has {tuple(shapes[key])}{more}")


def _matrices(adapters: State, blocks: Sequence[str], shapes: Shapes, file: Path, like: str) -> State:
    """Block -> D of every adapter."""
    found = {_index(key, file): tensor for key, tensor in adapters.items()}
    extra = sorted(found.keys() - set(range(len(blocks))))
    if extra:
        given = tuple(found[extra[0]].shape)
        raise UserError(
            f"{file}: adapter_list.{extra[0]}, {given}, follows no block: {like} has {len(blocks)} blocks that take an "
            f"adapter, and the list has {len(found)}"
        )
    matrices = {}
    for index, block in enumerate(blocks):
        channels = width(block, shapes)
        expected = f"{block} of {like} expects ({channels}, {channels}, 1, 1)"
        if index not in found:
            raise UserError(
                f"{file}: adapter_list.{index} is missing ({len(found)} of {len(blocks)} there): {expected}"
            )
        if tuple(found[index].shape) != (channels, channels, 1, 1):
            raise UserError(f"{file}: adapter_list.{index} has shape {tuple(found[index].shape)}, but {expected}")
        matrices[block] = _plus_identity(found[index][:, :, 0, 0], -1)
    return matrices


def _index(key: str, file: Path) -> int:
    found = _ADAPTER.fullmatch(key)
    if not found:
        raise UserError(f"{file}: {key} is unknown; adapters are adapter_list.i.weight, (C, C, 1, 1) without bias")
    return int(found[1])


def _plus_identity(matrix: torch.Tensor, sign: int) -> torch.Tensor:
    """A copy plus or minus I: off the diagonal no bit changes."""
    copy = matrix.clone(memory_format=torch.contiguous_format)
    copy.diagonal().add_(sign)
    return copy


def public_state(weights: State, matrices: State, config: Mapping[str, Any], *, where: Path) -> State:
    """What the public code's model takes by `load_state_dict`: old names, and I + D after every block (I where D = 0).

    Raises UserError for a model that it cannot build, and for projections that are not of the placement `block`.
    """
    _check_buildable(config, where)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    blocks = adapted_blocks(shapes, config)
    foreign = sorted(place for place, matrix in matrices.items() if place not in blocks and matrix.count_nonzero())
    if foreign:
        raise UserError(
            f"{where}: a projection after {foreign[0]} ({len(foreign)} such), where the public code has none; it takes "
            "decouple.projection=block (after blocks without skip_conv) or none"
        )
    state = {old_name(key): tensor for key, tensor in weights.items()}
    for index, block in enumerate(blocks):
        like, channels = weights[f"{block}.resnets.0.conv1.weight"], width(block, shapes)
        assert channels is not None, "every block of a UNet2DModel has resnets"
        matrix = matrices.get(block, torch.zeros(channels, channels)).to(like.dtype)
        state[f"{_ADAPTERS}{index}.weight"] = _plus_identity(matrix, 1)[:, :, None, None]
    return state


def _check_buildable(config: Mapping[str, Any], where: Path) -> None:
    if config.get("_class_name") != "UNet2DModel":
        raise UserError(f"{where}: a {config.get('_class_name')}; the public code has adapters in UNet2DModel only")
    for option, plain in _PLAIN.items():
        if config.get(option, plain) != plain:
            raise UserError(f"{where}: {option} is {config[option]!r}, and the public code knows {plain!r} only")


def adapter_widths(state: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """C of a public state dict's adapters, in their order."""
    return tuple(tensor.shape[0] for key, tensor in state.items() if key.startswith(_ADAPTERS))
