"""Box plots of task-vector entries by layer, a panel a range, and relative norms by block (Fig. 6b)."""

from __future__ import annotations

from collections.abc import Sequence

from deme_diffusion.figure_file import FigureData
from deme_diffusion.report.drawing.picture import Picture


def pictures(data: Sequence[FigureData]) -> list[Picture]:
    """To come."""
    raise NotImplementedError
