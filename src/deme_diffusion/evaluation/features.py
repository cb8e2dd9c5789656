"""Images to features: the same quantisation and preprocessing for real and generated ones, named in the protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from deme_diffusion.data.splits import Split, to_pixels
from deme_diffusion.evaluation.extractors.base import Extractor, Pixels

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Extracted:
    """What an extractor says of n images: features (n, d), and logits (n, k) where it has classes."""

    features: Array
    logits: Array | None


def extract(batches: Iterable[Pixels], extractor: Extractor) -> Extracted:
    """Features and logits of batches of uint8 (b, h, w, c)."""
    answers = [extractor(batch) for batch in batches]
    features = np.concatenate([features.numpy() for features, _ in answers])
    logits = [logits.numpy() for _, logits in answers if logits is not None]
    return Extracted(features, np.concatenate(logits) if logits else None)


def features_of(pixels: Pixels, extractor: Extractor, batch_size: int | None = None) -> Array:
    """uint8 (n, h, w, c) -> float32 (n, d)."""
    return extract(in_batches(pixels, batch_size or extractor.batch_size(pixels)), extractor).features


def in_batches(pixels: Pixels, batch_size: int) -> Iterator[Pixels]:
    """The images in their order, up to `batch_size` at once."""
    return (pixels[i : i + batch_size] for i in range(0, len(pixels), batch_size))


def extract_real(split: Split, extractor: Extractor, count: int | None = None) -> Extracted:
    """Of the first `count` views (null: of all) of a split's images, view after view, a batch in memory at a time."""
    total = min(count or len(split) * split.settings.views, len(split) * split.settings.views)
    size = extractor.batch_size(real_between(split, 0, 1))
    batches = (real_between(split, start, min(start + size, total)) for start in range(0, total, size))
    return extract(batches, extractor)


def real_between(split: Split, start: int, stop: int) -> Pixels:
    """Views [start, stop), counted view after view, as 8-bit pixels, just as generated images are quantised."""
    n = len(split)
    views = range(start // n, (stop - 1) // n + 1)
    parts = [split.view(v, max(start - v * n, 0), min(stop - v * n, n)) for v in views]
    return to_pixels(torch.cat(parts))


def real_pixels(split: Split) -> Pixels:
    """Every view of a split's images."""
    return real_between(split, 0, len(split) * split.settings.views)
