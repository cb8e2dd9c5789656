"""Sample grids of the same seeds, and one image's way through the steps."""

from __future__ import annotations

from collections.abc import Sequence

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.picture import Picture


def pictures(data: Sequence[FigureData]) -> list[Picture]:
    """To come."""
    raise NotImplementedError
