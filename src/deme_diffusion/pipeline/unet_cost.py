"""What one image costs a `UNet2DModel`, counted from its config: parameters, FLOPs, memory. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

FLOAT = 4
"""Bytes: activations are counted in float32, which half precision about halves."""
PLAIN = {  # what the count below takes for granted; None: not told, which is the same
    "resnet_time_scale_shift": ("default", None),
    "time_embedding_type": ("positional", None),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", None),
    "upsample_type": ("conv", None),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")


@dataclass(frozen=True)
class Cost:
    """Of one image: `flops` of a forward pass, and bytes of float32 activations.

    `kept` is what training holds for the backward pass, `checkpointed` the same with gradient checkpointing, `peak`
    what a forward pass without gradients needs at once.
    """

    parameters: int
    flops: float
    kept: int
    checkpointed: int
    peak: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """A residual block, an attention, a resampling: parameters, multiply-adds, elements kept and those that enter."""

    parameters: int
    macs: int
    kept: int
    enters: int


def unet_cost(config: Mapping[str, Any]) -> Cost | None:
    """The cost of a `UNet2DModel`; None where the config has blocks or options that this count does not know."""
    types = (*config["down_block_types"], *config["up_block_types"])
    if any(kind not in BLOCKS for kind in types) or not config.get("sample_size"):
        return None
    if any(config.get(key, plain[0]) not in plain for key, plain in PLAIN.items()):
        return None
    parts, skips = _parts(config)
    largest = max(part.kept for part in parts)
    return Cost(
        parameters=sum(part.parameters for part in parts),
        flops=2.0 * sum(part.macs for part in parts),
        kept=FLOAT * sum(part.kept for part in parts),
        checkpointed=FLOAT * (sum(part.enters for part in parts) + largest),
        peak=FLOAT * (skips + largest),
        shape=(config["in_channels"], *_size(config)),
    )


def _size(config: Mapping[str, Any]) -> tuple[int, int]:
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _parts(config: Mapping[str, Any]) -> tuple[list[_Part], int]:
    """Every part in the order of the forward pass, and the elements of all skip connections."""
    widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
    channels, pixels, embedding = widths[0], prod(_size(config)), 4 * widths[0]
    attends = config.get("add_attention", True)
    parts = [_embedding(widths[0], embedding), _convolution(config["in_channels"], channels, pixels)]
    skips = [(channels, pixels)]

    def residual(enters: int, leaves: int, attention: bool) -> int:
        parts.append(_residual(enters, leaves, embedding, pixels))
        if attention:
            parts.append(_attention(leaves, pixels))
        return leaves

    for i, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
        for _ in range(layers):
            channels = residual(channels, width, kind.startswith("Attn"))
            skips.append((channels, pixels))
        if i + 1 < len(widths):
            parts.append(_convolution(channels, channels, pixels // 4, pixels))
            pixels //= 4
            skips.append((channels, pixels))
    elements = sum(width * size for width, size in skips)
    residual(channels, channels, attends)
    residual(channels, channels, False)
    for i, (kind, width) in enumerate(zip(config["up_block_types"], reversed(widths), strict=True)):
        for _ in range(layers + 1):
            channels = residual(channels + skips.pop()[0], width, kind.startswith("Attn"))
        if i + 1 < len(widths):
            pixels *= 4
            parts.append(_convolution(channels, channels, pixels))
    norm = _Part(2 * channels, 0, 2 * channels * pixels, channels * pixels)
    return [*parts, norm, _convolution(channels, config["out_channels"], pixels)], elements


def _convolution(enters: int, leaves: int, pixels: int, pixels_before: int | None = None) -> _Part:
    """3x3; `pixels` are those that it leaves."""
    weights, kept = 9 * enters * leaves, enters * (pixels_before or pixels)
    return _Part(weights + leaves, weights * pixels, kept, kept)


def _residual(enters: int, leaves: int, embedding: int, pixels: int) -> _Part:
    """Norm, SiLU, convolution, timestep embedding; norm, SiLU, convolution; a 1x1 shortcut where the width changes."""
    weights = 9 * enters * leaves + 9 * leaves * leaves + (enters * leaves if enters != leaves else 0)
    biases = leaves * (2 + (enters != leaves)) + 2 * enters + 2 * leaves  # of convolutions; of the norms
    shift = embedding * leaves
    kept = 3 * (enters + leaves) * pixels  # before and after each norm, after each SiLU
    return _Part(weights + biases + shift + leaves, weights * pixels + shift, kept, enters * pixels)


def _attention(channels: int, pixels: int) -> _Part:
    """Norm; query, key, value, output; a fused attention, which keeps no map of pixels x pixels."""
    weights = 4 * channels * channels
    macs = weights * pixels + 2 * channels * pixels * pixels
    return _Part(weights + 4 * channels + 2 * channels, macs, 6 * channels * pixels, channels * pixels)


def _embedding(width: int, embedding: int) -> _Part:
    weights = width * embedding + embedding * embedding
    return _Part(weights + 2 * embedding, weights, 0, 0)
