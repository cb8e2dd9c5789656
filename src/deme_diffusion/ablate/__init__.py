"""Ablation plans carried out as experiments: documents, the parts they speak of, arms, execution. No torch."""

from deme_diffusion.ablate.plan import Ablation, Plan, Problem
from deme_diffusion.ablate.reading import read_plan

__all__ = ["Ablation", "Plan", "Problem", "read_plan"]
