"""What every extractor is to a metric: 8-bit images in; features, and class logits where it has classes, out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.errors import UserError

Pixels = npt.NDArray[np.uint8]
MOST_PIXELS = 2**20
"""Pixels of a batch as the network sees them: more would only take memory."""


class Extractor(nn.Module, ABC):
    """A frozen network on 8-bit images: `outputs(inputs(pixels))`, on the device that it was moved to."""

    preprocessing: str
    """What happens to the pixels first: a definition by name, part of every image metric's protocol."""
    dimension: int
    """d, the length of a feature."""
    channels: int = 3
    """Of the images that it takes; grey ones are repeated."""

    @abstractmethod
    def inputs(self, pixels: Pixels) -> torch.Tensor:
        """uint8 (n, h, w, c) -> what the network sees, still on the CPU."""

    @abstractmethod
    def outputs(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features (n, d) and class logits (n, k), or None where the network has no classes."""

    def batch_size(self, pixels: Pixels) -> int:
        """Images like these that go through at once."""
        height, width = pixels.shape[1:3]
        return min(1024, max(16, MOST_PIXELS // int(height * width)))

    @torch.no_grad()
    def forward(self, pixels: Pixels) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 (n, h, w, c) -> float32 features (n, d) and logits (n, k), on the CPU.

        Raises UserError where the images do not fit, or the network answers NaN or infinity.
        """
        device = next(self.parameters()).device
        features, logits = self.outputs(self.inputs(pixels).to(device))
        if not torch.isfinite(features).all():
            raise UserError("extractor: it answers NaN or infinity; its weights are not whole")
        return features.float().cpu(), None if logits is None else logits.float().cpu()


def repeated(pixels: Pixels, channels: int) -> Pixels:
    """Grey images as often as the network has channels. Raises UserError for other numbers of channels."""
    there = pixels.shape[3]
    if there == channels:
        return pixels
    if there != 1:
        fitting = "data.mode=L, or an extractor of colour images" if channels == 1 else "images of 1 or 3 channels"
        raise UserError(f"extractor: it takes images of {channels} channels, these have {there}; use {fitting}")
    return np.repeat(pixels, channels, axis=3)
