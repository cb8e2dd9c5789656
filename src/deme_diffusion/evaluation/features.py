"""Images to features: the same quantisation and preprocessing for real and generated ones, named in the protocol."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from deme_diffusion.data.splits import Split, to_model_range, to_pixels
from deme_diffusion.evaluation.extractor import SmallClassifier


@torch.no_grad()
def features_of(
    pixels: npt.NDArray[np.uint8], model: SmallClassifier, batch_size: int = 1024
) -> npt.NDArray[np.float32]:
    """uint8 (n, h, w, c) -> float32 (n, d)."""
    parts = [
        model.features(to_model_range(pixels[i : i + batch_size])).numpy() for i in range(0, len(pixels), batch_size)
    ]
    return np.concatenate(parts)


def real_pixels(split: Split) -> npt.NDArray[np.uint8]:
    """Every view of a split's images as 8-bit pixels, just as generated images are quantised."""
    return to_pixels(split.views())
