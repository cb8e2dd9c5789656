"""Random affine augmentation of a batch, each sample keyed by (seed, step, global sample index)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from deme_diffusion.config import AugmentSettings
from deme_diffusion.rng import uniforms


def augmented(
    images: torch.Tensor, settings: AugmentSettings, *, seed: int, purpose: str, step: int, first: int
) -> torch.Tensor:
    """(b, c, h, w) in [-1, 1] -> the same shape and range; sample i is keyed by (seed, purpose, step, first + i)."""
    if settings == AugmentSettings():
        return images
    draws = uniforms(seed, purpose, step, first, len(images), each=5)
    flip = torch.from_numpy(draws[:, 4] < settings.flip)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if settings.shift == settings.rotate == settings.scale == 0.0:
        return images  # a flip alone must not pass through an interpolation
    theta = torch.from_numpy(_affine(draws[:, :4] * 2 - 1, settings, images.shape[-2:]))
    grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return warped.clamp(-1, 1)  # bicubic interpolation overshoots


def _affine(draws: np.ndarray, settings: AugmentSettings, size: torch.Size) -> np.ndarray:
    """(b, 2, 3) maps from output to input coordinates in [-1, 1], from (b, 4) draws in [-1, 1)."""
    height, width = size
    angle = draws[:, 0] * math.radians(settings.rotate)
    zoom = 1.0 + draws[:, 1] * settings.scale
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    right, down = draws[:, 2] * settings.shift * 2 / width, draws[:, 3] * settings.shift * 2 / height
    aspect = height / width
    rows = [[cos, -sin * aspect, right], [sin / aspect, cos, down]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=1)
