"""Images reduced to a protocol's size before anything is measured on them: generated and reference ones alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from deme_diffusion.errors import UserError

Pixels = npt.NDArray[np.uint8]
Fit = Literal["squeezed", "cropped"]
PREPROCESSING = "bicubic, on 8-bit pixels"
"""How images are reduced: PIL's resize, which averages over all pixels that one covers."""


def size_at(size: tuple[int, ...], side: int | None) -> tuple[int, int]:
    """(h, w) of an image of `size` whose shorter side is reduced to `side`; smaller ones stay."""
    height, width = size
    if side is None or min(size) <= side:
        return height, width
    scale = side / min(size)
    return round(height * scale), round(width * scale)


def reduced_to(images: Pixels, side: int | None) -> Pixels:
    """(n, h, w, c) with the shorter side reduced to `side`, where it is longer."""
    size = size_at(images.shape[1:3], side)
    if size == images.shape[1:3]:
        return images
    return np.stack([_resized(image, size) for image in images])


def _resized(image: Pixels, size: tuple[int, int]) -> Pixels:
    made = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).resize(
        size[::-1], Image.Resampling.BICUBIC
    )
    return np.asarray(made).reshape(*size, image.shape[-1])


def reference_batches(
    files: Sequence[Path], shape: tuple[int, ...], fit: Fit, batch_size: int = 64
) -> Iterator[Pixels]:
    """Real images from files as (b, h, w, c), made to be of `shape` (c, h, w): squeezed, or the largest part cut out.

    Raises UserError for a file that is no image.
    """
    for first in range(0, len(files), batch_size):
        yield np.stack([_reference(file, shape, fit) for file in files[first : first + batch_size]])


def _reference(file: Path, shape: tuple[int, ...], fit: Fit) -> Pixels:
    channels, height, width = shape
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"evaluate.prompts.images: {file} cannot be read ({error})") from None
    box = None if fit == "squeezed" else _middle(image.size, width / height)
    made = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(made).reshape(height, width, channels)


def _middle(size: tuple[int, int], ratio: float) -> tuple[float, float, float, float]:
    """The largest box of width / height `ratio` in the middle of an image (w, h)."""
    wide, high = size
    w, h = (wide, wide / ratio) if wide < high * ratio else (high * ratio, high)
    return ((wide - w) / 2, (high - h) / 2, (wide + w) / 2, (high + h) / 2)
