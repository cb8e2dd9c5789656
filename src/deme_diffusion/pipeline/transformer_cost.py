"""What one image costs the transformers of DiT, Stable Diffusion 3, Flux and Wan, counted from a config. No torch.

Each part is a block, which is what gradient checkpointing runs anew. Elements kept, of a block of n tokens of width c:
3 n c for a norm that is scaled (before, after, scaled), 3 for query, key and value, 4 for norms of the first two, 1 for
the answer, 1 for each branch that a gate scales, 8 for a feed-forward of four times the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from deme_diffusion.pipeline.cost_parts import Cost, Linear, Part, part, whole
from deme_diffusion.pipeline.unet_cost import size_of

SINUSOIDS = 256
"""Width of the embedding of t."""


def dit_cost(config: Mapping[str, Any]) -> Cost | None:
    """The cost of a `DiTTransformer2DModel`."""
    width = _width(config, 16, 72)
    channels, patch = int(config.get("in_channels", 4)), int(config.get("patch_size", 2))
    height, columns = size_of({"sample_size": config.get("sample_size", 32)})
    tokens = (height // patch) * (columns // patch)
    classes = int(config.get("num_embeds_ada_norm") or 1000) + 1  # and none
    layers = [
        *_attends("attn1", width, tokens, bias=bool(config.get("attention_bias", True))),
        *_feeds("ff", width, tokens),
        *_timestep(width),
        Linear("norm1.linear", width, 6 * width),
    ]
    block = part(
        layers,
        kept=20 * width * tokens,
        enters=width * tokens,
        macs=2 * width * tokens**2,
        parameters=classes * width,
    )
    leaves = patch**2 * int(config.get("out_channels") or channels)
    ends = [
        Linear("pos_embed.proj", patch**2 * channels, width, tokens),
        Linear("proj_out_1", width, 2 * width),
        Linear("proj_out_2", width, leaves, tokens),
    ]
    # The embedding of the first block is asked once more for the output.
    asked = sum(layer.macs for layer in _timestep(width))
    blocks = [block] * int(config.get("num_layers", 28))
    return whole([part(ends, kept=3 * width * tokens, macs=asked), *blocks], (channels, height, columns))


def sd3_cost(config: Mapping[str, Any], text: int) -> Cost | None:
    """The cost of an `SD3Transformer2DModel` whose context is `text` tokens."""
    if config.get("qk_norm") not in (None, "rms_norm"):
        return None
    width, head = _width(config, 18, 64), int(config.get("attention_head_dim", 64))
    channels, patch = int(config.get("in_channels", 16)), int(config.get("patch_size", 2))
    height, columns = size_of({"sample_size": config.get("sample_size", 128)})
    tokens, count = (height // patch) * (columns // patch), int(config.get("num_layers", 18))
    twice = tuple(config.get("dual_attention_layers") or ())
    normed = config.get("qk_norm") is not None
    blocks = [
        _joint(width, tokens, text, head if normed else 0, dual=i in twice, last=i == count - 1) for i in range(count)
    ]
    ends = [
        Linear("pos_embed.proj", patch**2 * channels, width, tokens),
        *_timestep(width),
        *_pooled(int(config.get("pooled_projection_dim", 2048)), width),
        Linear(
            "context_embedder",
            int(config.get("joint_attention_dim", 4096)),
            int(config.get("caption_projection_dim", width)),
            text,
        ),
        Linear("norm_out.linear", width, 2 * width),
        Linear("proj_out", width, patch**2 * int(config.get("out_channels") or channels), tokens),
    ]
    return whole([part(ends, kept=3 * width * tokens), *blocks], (channels, height, columns))


def flux_cost(config: Mapping[str, Any], text: int, size: tuple[int, int]) -> Cost:
    """The cost of a `FluxTransformer2DModel` on latents of that height and width, which it takes in 2 x 2 patches."""
    width, head = _width(config, 24, 128), int(config.get("attention_head_dim", 128))
    channels = int(config.get("in_channels", 64))
    tokens = (size[0] // 2) * (size[1] // 2)
    ends = [
        Linear("x_embedder", channels, width, tokens),
        Linear("context_embedder", int(config.get("joint_attention_dim", 4096)), width, text),
        *_timestep(width),
        *(_timestep(width) if config.get("guidance_embeds") else []),
        *_pooled(int(config.get("pooled_projection_dim", 768)), width),
        Linear("norm_out.linear", width, 2 * width),
        Linear("proj_out", width, int(config.get("out_channels") or channels), tokens),
    ]
    double = _joint(width, tokens, text, head, dual=False, last=False)
    single = _single(width, tokens + text, head)
    blocks = [double] * int(config.get("num_layers", 19)) + [single] * int(config.get("num_single_layers", 38))
    return whole([part(ends, kept=3 * width * tokens), *blocks], (channels // 4, *size))


def wan_cost(config: Mapping[str, Any], text: int, frames: int, size: tuple[int, int]) -> Cost | None:
    """The cost of a `WanTransformer3DModel` on latents of so many frames of that height and width."""
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        return None
    width, feeds = _width(config, 40, 128), int(config.get("ffn_dim", 13824))
    channels = int(config.get("in_channels", 16))
    patch = tuple(int(p) for p in config.get("patch_size", (1, 2, 2)))
    tokens = prod(length // p for length, p in zip((frames, *size), patch, strict=True))
    volume = prod(patch)
    ends = [
        Linear("patch_embedding", volume * channels, width, tokens),
        *_timestep(width, int(config.get("freq_dim", SINUSOIDS))),
        Linear("time_proj", width, 6 * width),
        Linear("text_embedder.linear_1", int(config.get("text_dim", 4096)), width, text),
        Linear("text_embedder.linear_2", width, width, text),
        Linear("proj_out", width, volume * int(config.get("out_channels") or channels), tokens),
    ]
    cross = bool(config.get("cross_attn_norm", True))
    layers = [
        *_attends("attn1", width, tokens),
        *_attends("attn2", width, tokens, text),
        Linear("ffn.net.0.proj", width, feeds, tokens),
        Linear("ffn.net.2", feeds, width, tokens),
    ]
    block = part(
        layers,
        kept=(21 + cross) * width * tokens + 2 * feeds * tokens + 4 * width * text,
        enters=width * tokens,
        macs=2 * width * tokens * (tokens + text),
        parameters=(4 + 2 * cross + 6) * width,  # norms of query and key, of the second attention, the table of shifts
    )
    standing = part(ends, kept=3 * width * tokens, parameters=2 * width)
    blocks = [block] * int(config.get("num_layers", 40))
    return whole([standing, *blocks], (channels, *((frames,) if frames > 1 else ()), *size))


# -- blocks ---------------------------------------------------------------------------------------


def _joint(width: int, tokens: int, text: int, head: int, *, dual: bool, last: bool) -> Part:
    """Image and text in one attention, each with layers of its own (Esser et al. 2024); `head`: width of its norms.

    `last`: nothing of the text is used afterwards; `dual`: a second attention, of the image alone.
    """
    layers = [
        *_attends("attn", width, tokens),
        *(Linear(f"attn.add_{name}_proj", width, width, text) for name in "qkv"),
        *_feeds("ff", width, tokens),
        Linear("norm1.linear", width, (9 if dual else 6) * width),
        Linear("norm1_context.linear", width, (2 if last else 6) * width),
    ]
    layers += [] if last else [Linear("attn.to_add_out", width, width, text), *_feeds("ff_context", width, text)]
    layers += _attends("attn2", width, tokens) if dual else []
    normed = 4 * bool(head)
    kept = (20 + normed) * width * tokens + ((6 if last else 20) + normed) * width * text
    kept += (6 + normed) * width * tokens if dual else 0
    attended = 2 * width * ((tokens + text) ** 2 + dual * tokens**2)
    norms = (4 + 2 * dual) * head
    return part(layers, kept=kept, enters=width * (tokens + text), macs=attended, parameters=norms)


def _single(width: int, tokens: int, head: int) -> Part:
    """Flux's block on text and image as one sequence: attention beside the feed-forward, one projection for both."""
    layers = [
        *(Linear(f"attn.to_{name}", width, width, tokens) for name in "qkv"),
        Linear("proj_mlp", width, 4 * width, tokens),
        Linear("proj_out", 5 * width, width, tokens),
        Linear("norm.linear", width, 3 * width),
    ]
    attended = 2 * width * tokens**2
    return part(layers, kept=21 * width * tokens, enters=width * tokens, macs=attended, parameters=2 * head)


def _attends(name: str, width: int, tokens: int, others: int | None = None, *, bias: bool = True) -> list[Linear]:
    """Query, key, value and output; keys and values of `others` where it is not a self-attention."""
    asked = {"q": tokens, "k": others or tokens, "v": others or tokens}
    layers = [Linear(f"{name}.to_{key}", width, width, count, bias=bias) for key, count in asked.items()]
    return [*layers, Linear(f"{name}.to_out.0", width, width, tokens)]


def _feeds(name: str, width: int, tokens: int) -> list[Linear]:
    first = Linear(f"{name}.net.0.proj", width, 4 * width, tokens)
    return [first, Linear(f"{name}.net.2", 4 * width, width, tokens)]


def _timestep(width: int, sinusoids: int = SINUSOIDS) -> list[Linear]:
    return [
        Linear("timestep_embedder.linear_1", sinusoids, width),
        Linear("timestep_embedder.linear_2", width, width),
    ]


def _pooled(enters: int, width: int) -> list[Linear]:
    return [Linear("text_embedder.linear_1", enters, width), Linear("text_embedder.linear_2", width, width)]


def _width(config: Mapping[str, Any], heads: int, head: int) -> int:
    return int(config.get("num_attention_heads", heads)) * int(config.get("attention_head_dim", head))
