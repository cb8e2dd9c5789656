"""Methods that weigh whole entries: Eq. 8 and its kin."""

from __future__ import annotations

from deme_diffusion.merging.methods import Parameter
from deme_diffusion.merging.vectors import Weight, interpolate


def task_arithmetic(p: Parameter) -> Weight:
    """theta + sum_i w_i tau_i (Eq. 8)."""
    return interpolate(p.base, list(p.experts), list(p.weights))
