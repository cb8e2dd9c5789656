"""Gradient similarity: a heatmap over bins of timesteps and the histogram over pairs (Fig. 1a)."""

from __future__ import annotations

from collections.abc import Sequence

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.picture import Picture


def pictures(data: Sequence[FigureData]) -> list[Picture]:
    """To come."""
    raise NotImplementedError
