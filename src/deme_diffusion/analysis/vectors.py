"""The entries of the task vectors by layer (Fig. 6b), and their norms by block relative to the base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

Load = Callable[[], nn.Module]
"""Gives a model as it is served: folded, in eval mode, on its device."""


def write_vectors(path: Path, base: Path, experts: Sequence[Path], *, names: Sequence[str]) -> dict[str, Any]:
    """To come."""
    raise NotImplementedError
