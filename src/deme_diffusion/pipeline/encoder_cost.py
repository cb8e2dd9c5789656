"""What the parts around a denoiser cost: autoencoders, text encoders, and the CLIP that scores images. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from deme_diffusion.pipeline.cost_parts import FLOAT, Encoders, Part, attention, convolution, norm, residual

USUAL = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
"""The autoencoder of Stable Diffusion: 83.7M parameters; 1.1 TFLOP to encode 512 x 512, 2.5 to decode it."""


@dataclass(frozen=True)
class TextEncoder:
    """Parameters, FLOPs of a caption, tokens, width of what it gives for each token."""

    parameters: int
    flops: float
    tokens: int
    width: int
    pooled: int


# -- autoencoders ---------------------------------------------------------------------------------


def downscaling(config: Mapping[str, Any]) -> int:
    """Pixels of an image along a side of one latent."""
    if config.get("_class_name") == "AutoencoderKLWan":
        return int(config.get("scale_factor_spatial", 8))
    return int(2 ** (len(config["block_out_channels"]) - 1))


@dataclass(frozen=True)
class Autoencoder:
    """Parameters; FLOPs, and bytes of activations in float32, of an image encoded and of one decoded."""

    parameters: int
    encode: float
    decode: float
    encode_peak: int
    decode_peak: int


def autoencoder(config: Mapping[str, Any], size: tuple[int, int]) -> Autoencoder:
    """Of an `AutoencoderKL`, for an image of (h, w). Another class is taken for the usual one, which it is like."""
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        config = USUAL
    encoder, decoder = list(_encoder(config, prod(size))), list(_decoder(config, prod(size)))
    (encode, into), (decode, out_of) = (
        (2.0 * sum(part.macs for part in parts), FLOAT * max(part.kept for part in parts))
        for parts in (encoder, decoder)
    )
    return Autoencoder(sum(part.parameters for part in (*encoder, *decoder)), encode, decode, into, out_of)


def _encoder(config: Mapping[str, Any], pixels: int) -> Iterator[Part]:
    widths, layers = list(config["block_out_channels"]), int(config.get("layers_per_block", 1))
    channels, latents = widths[0], int(config.get("latent_channels", 4))
    yield convolution(int(config.get("in_channels", 3)), channels, pixels)
    for i, width in enumerate(widths):
        for _ in range(layers):
            yield residual(channels, width, 0, pixels)
            channels = width
        if i + 1 < len(widths):
            yield convolution(channels, channels, pixels // 4, pixels)
            pixels //= 4
    yield from _middle(config, channels, pixels)
    yield norm(channels, pixels)
    yield convolution(channels, 2 * latents, pixels)
    if config.get("use_quant_conv", True):
        yield convolution(2 * latents, 2 * latents, pixels, side=1)


def _decoder(config: Mapping[str, Any], pixels: int) -> Iterator[Part]:
    widths, layers = list(config["block_out_channels"])[::-1], int(config.get("layers_per_block", 1))
    channels, latents = widths[0], int(config.get("latent_channels", 4))
    pixels //= 4 ** (len(widths) - 1)
    if config.get("use_post_quant_conv", True):
        yield convolution(latents, latents, pixels, side=1)
    yield convolution(latents, channels, pixels)
    yield from _middle(config, channels, pixels)
    for i, width in enumerate(widths):
        for _ in range(layers + 1):
            yield residual(channels, width, 0, pixels)
            channels = width
        if i + 1 < len(widths):
            pixels *= 4
            yield convolution(channels, channels, pixels)
    yield norm(channels, pixels)
    yield convolution(channels, int(config.get("out_channels", 3)), pixels)


def _middle(config: Mapping[str, Any], channels: int, pixels: int) -> Iterator[Part]:
    yield residual(channels, channels, 0, pixels)
    if config.get("mid_block_add_attention", True):
        yield attention(channels, pixels)
    yield residual(channels, channels, 0, pixels)


# -- text -----------------------------------------------------------------------------------------


def text_encoder(config: Mapping[str, Any], tokens: int | None = None) -> TextEncoder:
    """A CLIP text model, or the encoder of a T5 or UMT5, on so many tokens (CLIP: as many as it has places for)."""
    return _t5(config, tokens or 512) if "d_model" in config else _clip_text(config)


def _clip_text(config: Mapping[str, Any]) -> TextEncoder:
    width, tokens = int(config["hidden_size"]), int(config.get("max_position_embeddings", 77))
    parameters, flops = _layers(config, width, tokens)
    parameters += (int(config["vocab_size"]) + tokens + 2) * width
    pooled = int(config.get("projection_dim") or 0) if _projects(config) else 0
    return TextEncoder(parameters + pooled * width, flops + 2.0 * pooled * width, tokens, width, pooled or width)


def _projects(config: Mapping[str, Any]) -> bool:
    return any("WithProjection" in str(name) for name in config.get("architectures") or ())


def _layers(config: Mapping[str, Any], width: int, tokens: int) -> tuple[int, float]:
    """Parameters and FLOPs of the layers of a CLIP transformer."""
    count, inner = int(config["num_hidden_layers"]), int(config["intermediate_size"])
    weights = 4 * width**2 + 2 * width * inner
    parameters = weights + 4 * width + width + inner + 4 * width  # biases; norms
    return count * parameters, 2.0 * count * (weights * tokens + 2 * width * tokens**2)


def _t5(config: Mapping[str, Any], tokens: int) -> TextEncoder:
    width, heads = int(config["d_model"]), int(config["num_heads"])
    inner, feeds, count = heads * int(config["d_kv"]), int(config["d_ff"]), int(config["num_layers"])
    gated = "gated" in str(config.get("feed_forward_proj", "relu"))
    weights = 4 * width * inner + (2 + gated) * width * feeds
    buckets = int(config.get("relative_attention_num_buckets", 32)) * heads
    tables = buckets * (count if config.get("model_type") == "umt5" else 1)
    parameters = int(config["vocab_size"]) * width + count * (weights + 2 * width) + width + tables
    flops = 2.0 * count * (weights * tokens + 2 * inner * tokens**2)
    return TextEncoder(parameters, flops, tokens, width, 0)


def clip_cost(text: Mapping[str, Any], vision: Mapping[str, Any], projection: int) -> tuple[int, float]:
    """Parameters of a CLIP, and FLOPs of an image with its caption."""
    side, patch = int(vision.get("image_size", 224)), int(vision.get("patch_size", 14))
    width, patches = int(vision["hidden_size"]), (side // patch) ** 2
    parameters, flops = _layers(vision, width, patches + 1)
    embedding = int(vision.get("num_channels", 3)) * patch**2 * width
    parameters += embedding + (patches + 2) * width + 4 * width + projection * width  # class, places; norms
    words = _clip_text(text)
    total = parameters + words.parameters + projection * words.width + 1  # and the temperature
    return total, flops + 2.0 * (embedding * patches + projection * (width + words.width)) + words.flops


# -- together -------------------------------------------------------------------------------------


def encoders(
    vae: Mapping[str, Any],
    texts: Sequence[Mapping[str, Any]],
    family: str,
    latents: tuple[int, int],
    tokens: int | None,
) -> Encoders:
    """Of a pipeline whose latents are (h, w); `tokens` of T5."""
    scale = downscaling(vae)
    size = (latents[0] * scale, latents[1] * scale)
    found = [text_encoder(config, tokens) for config in texts]
    own = autoencoder(vae, size)
    return Encoders(
        parameters=own.parameters + sum(text.parameters for text in found),
        encode=own.encode,
        decode=own.decode,
        caption=sum(text.flops for text in found),
        condition=condition_of(family, found),
        encode_peak=own.encode_peak,
        decode_peak=own.decode_peak,
        image=(int(vae.get("in_channels", 3)), *size),
    )


def condition_of(family: str, texts: Sequence[TextEncoder]) -> int:
    """Numbers that a caption is kept as, by how the family's pipeline puts its text encoders together."""
    if family == "dit" or not texts:
        return 1
    if family == "stable_diffusion_xl":  # states side by side, the second's pooled, six numbers of size and crop
        return texts[0].tokens * sum(text.width for text in texts) + texts[-1].pooled + 6
    if family == "stable_diffusion_3":  # two of CLIP padded to the width of T5, T5 after them; both pooled
        *clips, last = texts
        return (clips[0].tokens + last.tokens) * last.width + sum(text.pooled for text in clips)
    if family == "flux":
        return texts[-1].tokens * texts[-1].width + texts[0].pooled
    return texts[0].tokens * texts[0].width
