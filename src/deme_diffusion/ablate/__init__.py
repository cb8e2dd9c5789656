"""Ablation plans carried out as experiments: documents, the parts they speak of, arms, execution. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deme_diffusion.ablate.plan import Ablation, Plan, Problem
from deme_diffusion.ablate.reading import read_plan

if TYPE_CHECKING:
    from deme_diffusion.ablate.running import Findings, run_plan

__all__ = ["Ablation", "Findings", "Plan", "Problem", "read_plan", "run_plan"]


def __getattr__(name: str) -> Any:
    """`run_plan` and what it returns: reading a plan needs nothing of what runs one."""
    if name in ("Findings", "run_plan"):
        from deme_diffusion.ablate import running

        return getattr(running, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
