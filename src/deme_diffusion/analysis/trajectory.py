"""Samples of the same seeds before and after, and one image's way through the steps of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from deme_diffusion.config import AnalyzeSettings, SamplerSettings
from deme_diffusion.division import Division
from deme_diffusion.models.denoiser import Denoiser

Load = Callable[[], nn.Module]
"""Gives a model as it is served: folded, in eval mode, on its device."""


def write_trajectory(
    path: Path,
    denoiser: Denoiser,
    models: Mapping[str, Load],
    division: Division,
    sampler: SamplerSettings,
    settings: AnalyzeSettings,
    *,
    names: Sequence[str],
    batch_size: int,
) -> dict[str, Any]:
    """To come."""
    raise NotImplementedError
