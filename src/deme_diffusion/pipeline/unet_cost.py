"""What one image costs a `UNet2DModel` or a `UNet2DConditionModel`, counted from its config. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from deme_diffusion.pipeline.cost_parts import Cost, Linear, Part, attention, convolution, norm, part, residual, whole

PLAIN = {  # what the count below takes for granted; None: not told, which is the same
    "resnet_time_scale_shift": ("default", None),
    "time_embedding_type": ("positional", None),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", None),
    "upsample_type": ("conv", None),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
PLAIN_CONDITION = {
    **PLAIN,
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default", None),
    "class_embeddings_concat": (False, None),
    "conv_in_kernel": (3, None),
    "conv_out_kernel": (3, None),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "only_cross_attention": (False, None),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_dim": (None,),
}
BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")
CONDITION_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")


def unet_cost(config: Mapping[str, Any]) -> Cost | None:
    """The cost of a `UNet2DModel`; None where the config has blocks or options that this count does not know."""
    if not _known(config, BLOCKS, PLAIN):
        return None
    parts, skips = _parts(config)
    return whole(parts, (config["in_channels"], *size_of(config)), skips)


def condition_unet_cost(config: Mapping[str, Any], tokens: int) -> Cost | None:
    """The cost of a `UNet2DConditionModel` that attends to so many tokens of text; None as for `unet_cost`."""
    if not _known(config, CONDITION_BLOCKS, PLAIN_CONDITION):
        return None
    parts, skips = _condition_parts(config, tokens)
    return whole(parts, (config["in_channels"], *size_of(config)), skips)


def _known(config: Mapping[str, Any], blocks: tuple[str, ...], plain: Mapping[str, tuple[Any, ...]]) -> bool:
    types = (*config["down_block_types"], *config["up_block_types"])
    if any(kind not in blocks for kind in types) or not config.get("sample_size"):
        return False
    return all(config.get(key, usual[0]) in usual for key, usual in plain.items())


def size_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of `sample_size`."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _parts(config: Mapping[str, Any]) -> tuple[list[Part], int]:
    """Every part in the order of the forward pass, and the elements of all skip connections."""
    widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
    channels, pixels, embedding = widths[0], prod(size_of(config)), 4 * widths[0]
    attends = config.get("add_attention", True)
    parts = [_embedding(widths[0], embedding), convolution(config["in_channels"], channels, pixels)]
    skips = [(channels, pixels)]

    def add(enters: int, leaves: int, attended: bool) -> int:
        parts.append(residual(enters, leaves, embedding, pixels))
        if attended:
            parts.append(attention(leaves, pixels))
        return leaves

    for i, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
        for _ in range(layers):
            channels = add(channels, width, kind.startswith("Attn"))
            skips.append((channels, pixels))
        if i + 1 < len(widths):
            parts.append(convolution(channels, channels, pixels // 4, pixels))
            pixels //= 4
            skips.append((channels, pixels))
    elements = sum(width * size for width, size in skips)
    add(channels, channels, attends)
    add(channels, channels, False)
    for i, (kind, width) in enumerate(zip(config["up_block_types"], reversed(widths), strict=True)):
        for _ in range(layers + 1):
            channels = add(channels + skips.pop()[0], width, kind.startswith("Attn"))
        if i + 1 < len(widths):
            pixels *= 4
            parts.append(convolution(channels, channels, pixels))
    return [*parts, norm(channels, pixels), convolution(channels, config["out_channels"], pixels)], elements


def _condition_parts(config: Mapping[str, Any], tokens: int) -> tuple[list[Part], int]:
    """The same of a U-Net whose blocks hold transformers, as many layers of them as the config says."""
    widths = list(config["block_out_channels"])
    count, linear = len(widths), bool(config.get("use_linear_projection"))
    layers, depths, texts = (
        _each(config.get(key, usual), count)
        for key, usual in (("layers_per_block", 2), ("transformer_layers_per_block", 1), ("cross_attention_dim", 1280))
    )
    channels, pixels, embedding = widths[0], prod(size_of(config)), 4 * widths[0]
    parts = [_embedding(widths[0], embedding), convolution(config["in_channels"], channels, pixels)]
    if config.get("addition_embed_type") == "text_time":
        parts.append(_embedding(config["projection_class_embeddings_input_dim"], embedding))
    skips = [(channels, pixels)]

    def add(enters: int, leaves: int, level: int, attended: bool = False) -> int:
        parts.append(residual(enters, leaves, embedding, pixels))
        if attended:
            parts.extend(_transformer(leaves, pixels, depths[level], texts[level], tokens, linear))
        return leaves

    for i, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
        for _ in range(layers[i]):
            channels = add(channels, width, i, kind.startswith("CrossAttn"))
            skips.append((channels, pixels))
        if i + 1 < count:
            parts.append(convolution(channels, channels, pixels // 4, pixels))
            pixels //= 4
            skips.append((channels, pixels))
    elements = sum(width * size for width, size in skips)
    add(channels, channels, count - 1, attended=True)
    add(channels, channels, count - 1)
    for i, (kind, width) in enumerate(zip(config["up_block_types"], reversed(widths), strict=True)):
        level = count - 1 - i
        for _ in range(layers[level] + 1):
            channels = add(channels + skips.pop()[0], width, level, kind.startswith("CrossAttn"))
        if i + 1 < count:
            pixels *= 4
            parts.append(convolution(channels, channels, pixels))
    return [*parts, norm(channels, pixels), convolution(channels, config["out_channels"], pixels)], elements


def _each(value: Any, count: int) -> list[int]:
    return [int(value)] * count if isinstance(value, int) else [int(v) for v in value]


def _transformer(width: int, pixels: int, depth: int, text: int, tokens: int, linear: bool) -> list[Part]:
    """Norm and projection in, `depth` layers of self-attention, attention to the text and a gated linear unit, out.

    `linear`: the projections are linear layers, not 1x1 convolutions.
    """
    held = 3 * width * pixels  # before and after the norm, before the projection out
    ends = [Linear("proj_in", width, width, pixels), Linear("proj_out", width, width, pixels)]
    around = part(ends, kept=held, enters=held, parameters=2 * width)
    around = around if linear else replace(around, convolved=around.macs)
    return [around, *[_layer(width, pixels, text, tokens)] * depth]


def _layer(width: int, pixels: int, text: int, tokens: int) -> Part:
    """A `BasicTransformerBlock`; attention is fused."""
    layers = [
        *(Linear(f"attn1.to_{name}", width, width, pixels, bias=False) for name in "qkv"),
        Linear("attn1.to_out.0", width, width, pixels),
        Linear("attn2.to_q", width, width, pixels, bias=False),
        *(Linear(f"attn2.to_{name}", text, width, tokens, bias=False) for name in "kv"),
        Linear("attn2.to_out.0", width, width, pixels),
        Linear("ff.net.0.proj", width, 8 * width, pixels),
        Linear("ff.net.2", 4 * width, width, pixels),
    ]
    # Self-attention 6 (norm's two ends, q, k, v, answer), attention to the text 4, the unit 2 + 8 + 4 + 4.
    kept = 28 * width * pixels + 2 * width * tokens
    attended = 2 * width * pixels * (pixels + tokens)
    return part(layers, kept=kept, enters=width * pixels, macs=attended, parameters=6 * width)


def _embedding(width: int, embedding: int) -> Part:
    weights = width * embedding + embedding * embedding
    return Part(weights + 2 * embedding, weights, 0, 0)
