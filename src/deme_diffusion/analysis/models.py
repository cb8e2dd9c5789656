"""What several figures are made of: models that are loaded when needed, and the points they are looked at on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from deme_diffusion.config import AnalyzeSettings
from deme_diffusion.division import names_of
from deme_diffusion.errors import UserError
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.models.precision import in_float32

Load = Callable[[], nn.Module]
"""Gives a model as it is served: folded, in eval mode, on its device."""


def each_in_float32(loads: Sequence[Load]) -> list[Load]:
    """The same models in float32: in half precision a small step in weights is lost to rounding."""
    return [lambda load=load: in_float32(load()) for load in loads]  # type: ignore[misc]


def protocol(noise: FixedNoise, settings: AnalyzeSettings) -> dict[str, Any]:
    """What losses and activations are taken on, as figures tell it. Raises UserError for a single image, which says
    nothing about others."""
    if noise.num_images < 2:
        raise UserError(f"analyze.split: the split {settings.split} has one image; two or more are compared")
    return {
        "split": settings.split,
        "num_images": noise.num_images,
        "draws": noise.settings.draws,
        "seed": noise.settings.seed,
        "T": noise.denoiser.num_train_timesteps,
        "ranges": [*names_of(noise.ranges)],
        "points": noise.num_images * noise.settings.draws * len(noise.ranges),
    }
