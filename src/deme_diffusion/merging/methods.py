"""Merge methods: pure functions over the tensors of one parameter, a citation a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.merging.vectors import Weight, interpolate


@dataclass(frozen=True)
class Method:
    """`merge(base, experts, weights) -> Weight` for one parameter, and where it comes from."""

    merge: Callable[[Weight, list[Weight], list[float]], Weight]
    source: str


METHODS = {
    "task_arithmetic": Method(interpolate, "Ilharco et al. 2023, arXiv 2212.04089; DeMe Eq. 8"),
}


def method(name: str) -> Method:
    """The method of that name. Raises UserError with the nearest name."""
    if name not in METHODS:
        raise UserError(f"merge.method: unknown method {name!r}{nearest(name, METHODS)}")
    return METHODS[name]
