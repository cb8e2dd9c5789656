"""What one image costs a network, put together from its parts: parameters, FLOPs, activations. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

FLOAT = 4
"""Bytes: activations are counted in float32, which half precision about halves."""


@dataclass(frozen=True)
class Encoders:
    """Around a denoiser of latents: their parameters, FLOPs of an image encoded, of one decoded, and of a caption.

    `condition` are the numbers that a caption is kept as, `encode_peak` and `decode_peak` the bytes in float32 that an
    image needs at once, `image` its shape (c, h, w).
    """

    parameters: int
    encode: float
    decode: float
    caption: float
    condition: int
    encode_peak: int
    decode_peak: int
    image: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """Of one image: `flops` of a forward pass, and bytes of float32 activations.

    `kept` is what training holds for the backward pass, `checkpointed` the same with gradient checkpointing, `peak`
    what a forward pass without gradients needs at once. `shape` is that of x_t; `linears` are the sums of widths (in
    plus out) of linear layers by name, which is what LoRA of rank 1 adds to them; `encoders` are of latent families;
    `convolved` are those of the FLOPs that are convolutions'.
    """

    parameters: int
    flops: float
    kept: int
    checkpointed: int
    peak: int
    shape: tuple[int, ...]
    linears: Mapping[str, int] = field(default_factory=dict)
    encoders: Encoders | None = None
    convolved: float = 0.0

    @property
    def image(self) -> tuple[int, ...]:
        """Shape of an image (c, h, w)."""
        return self.shape if self.encoders is None else self.encoders.image


@dataclass(frozen=True)
class Linear:
    """A linear layer of so many tokens, by the end of its name in diffusers."""

    name: str
    enters: int
    leaves: int
    tokens: int = 1
    bias: bool = True

    @property
    def parameters(self) -> int:
        """Its own."""
        return self.enters * self.leaves + self.leaves * self.bias

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.enters * self.leaves * self.tokens


@dataclass(frozen=True)
class Part:
    """What is checkpointed as one: parameters, multiply-adds, elements kept for the backward pass, those that enter.

    `convolved` are those of the multiply-adds that are convolutions'.
    """

    parameters: int
    macs: int
    kept: int
    enters: int
    linears: tuple[Linear, ...] = ()
    convolved: int = 0


def part(linears: Iterable[Linear], *, kept: int, enters: int = 0, macs: int = 0, parameters: int = 0) -> Part:
    """Of linear layers; `macs` and `parameters` are what else it has (attention, norms)."""
    layers = tuple(linears)
    weights, work = sum(layer.parameters for layer in layers), sum(layer.macs for layer in layers)
    return Part(weights + parameters, work + macs, kept, enters, layers)


def whole(parts: Sequence[Part], shape: tuple[int, ...], standing: int = 0) -> Cost:
    """A network of these parts; `standing` elements (skip connections) are held beside the largest of them."""
    largest = max(each.kept for each in parts)
    widths: Counter[str] = Counter()
    for layer in (layer for each in parts for layer in each.linears):
        widths[layer.name] += layer.enters + layer.leaves
    return Cost(
        parameters=sum(each.parameters for each in parts),
        flops=2.0 * sum(each.macs for each in parts),
        kept=FLOAT * sum(each.kept for each in parts),
        checkpointed=FLOAT * (sum(each.enters for each in parts) + largest),
        peak=FLOAT * (standing + largest),
        shape=shape,
        linears=dict(widths),
        convolved=2.0 * sum(each.convolved for each in parts),
    )


# -- convolutions ---------------------------------------------------------------------------------


def convolution(enters: int, leaves: int, pixels: int, pixels_before: int | None = None, side: int = 3) -> Part:
    """side x side; `pixels` are those that it leaves."""
    weights, kept = side * side * enters * leaves, enters * (pixels_before or pixels)
    return Part(weights + leaves, weights * pixels, kept, kept, convolved=weights * pixels)


def residual(enters: int, leaves: int, embedding: int, pixels: int) -> Part:
    """Norm, SiLU, convolution, timestep embedding (0: none); norm, SiLU, convolution; a 1x1 shortcut where needed."""
    weights = 9 * enters * leaves + 9 * leaves * leaves + (enters * leaves if enters != leaves else 0)
    biases = leaves * (2 + (enters != leaves)) + 2 * enters + 2 * leaves  # of convolutions; of the norms
    shift = embedding * leaves
    kept = 3 * (enters + leaves) * pixels  # before and after each norm, after each SiLU
    parameters, macs = weights + biases + shift + leaves * bool(embedding), weights * pixels
    return Part(parameters, macs + shift, kept, enters * pixels, convolved=macs)


def norm(channels: int, pixels: int) -> Part:
    """A group norm with its SiLU."""
    return Part(2 * channels, 0, 2 * channels * pixels, channels * pixels)


def attention(channels: int, pixels: int) -> Part:
    """Norm; query, key, value, output; a fused attention, which keeps no map of pixels x pixels."""
    layers = [Linear(name, channels, channels, pixels) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    attended, each = 2 * channels * pixels * pixels, channels * pixels
    return part(layers, kept=6 * each, enters=each, macs=attended, parameters=2 * channels)
