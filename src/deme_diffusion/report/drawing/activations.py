"""Activation differences along channels and along space (Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.picture import Picture


def pictures(data: Sequence[FigureData]) -> list[Picture]:
    """To come."""
    raise NotImplementedError
