"""Loss around the pretrained model (Fig. 4): over all timesteps and in each range, along two directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from deme_diffusion.config import AnalyzeSettings
from deme_diffusion.models.objective import FixedNoise

Load = Callable[[], nn.Module]
"""Gives a model as it is served: folded, in eval mode, on its device."""


def write_landscape(
    path: Path,
    noise: FixedNoise,
    base: nn.Module,
    experts: Sequence[Load],
    settings: AnalyzeSettings,
    *,
    names: Sequence[str],
    partial: Path,
) -> dict[str, Any]:
    """To come."""
    raise NotImplementedError
