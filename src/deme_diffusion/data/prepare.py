"""From an encoded image to the pixels that training sees: orientation, mode, size. Every choice is a named setting."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from deme_diffusion.config import DataSettings
from deme_diffusion.data.sources import Pixels

Encoded = bytes | Path
LARGEST = 2**28  # pixels of an image once resized, of which one may be held by each of a few threads
FILTERS = {"lanczos": "LANCZOS", "bicubic": "BICUBIC", "bilinear": "BILINEAR", "box": "BOX"}


class Corrupt(Exception):
    """An image that cannot be read; the message says why."""


def decode(encoded: Encoded) -> Any:
    """The PIL image, upright. Raises Corrupt for what is no image, is cut short, or is too large to be meant."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise Corrupt("not an image") from None
    except Exception as error:  # PIL's decoders raise a dozen kinds on broken files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise Corrupt(reason or type(error).__name__) from None


def prepared(image: Any, settings: DataSettings) -> Pixels:
    """uint8 (h, w, c): the mode, then the shorter side at `resolution`, then (unless it is random) the square crop.

    Raises Corrupt for what cannot be converted, and for a strip that the resize would make too large to be meant.
    """
    from PIL import Image

    image = in_mode(image, settings.mode)
    if settings.resolution is not None:
        width, height = image.size
        scale = settings.resolution / min(width, height)
        size = (max(settings.resolution, round(width * scale)), max(settings.resolution, round(height * scale)))
        if size[0] * size[1] > LARGEST:
            raise Corrupt(f"{width}x{height} is too narrow a strip")
        if size != image.size:
            image = image.resize(size, getattr(Image.Resampling, FILTERS[settings.interpolation]))
        if settings.crop == "center":
            image = image.crop(_center(size, settings.resolution))
    return as_array(image)


def as_array(image: Any) -> Pixels:
    """uint8 (h, w, c) of an RGB or grey image."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def in_mode(image: Any, mode: str) -> Any:
    """The image as RGB or grey: transparency becomes white, 16-bit grey is scaled and not clipped.

    Raises Corrupt for fractions, whose range nobody states, and for integers beyond 16 bits.
    """
    from PIL import Image

    if image.mode == "F":
        raise Corrupt("its pixels are fractions, of no known range")
    if image.mode.startswith("I"):  # I;16 and its orders of bytes; I for a 16-bit PGM
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise Corrupt("its pixels are integers beyond 16 bits")
        image = Image.fromarray((levels // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise Corrupt(str(error)) from None


def _center(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    left, top = ((length - side) // 2 for length in size)
    return left, top, left + side, top + side
