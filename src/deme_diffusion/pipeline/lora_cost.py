"""Parameters of a LoRA, by the linear layers of a component's cost. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from deme_diffusion.config import Recipe
from deme_diffusion.pipeline.cost_parts import Cost

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEEDS = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
TARGETS: dict[str, tuple[str, ...]] = {
    "stable_diffusion_3": tuple(f"attn.{name}" for name in _JOINT),
    "flux": (*(f"attn.{name}" for name in _JOINT), *_FEEDS),
}
"""Family -> the layers that are adapted where a recipe names none (`models.lora.TARGETS`, which needs torch)."""


def adapter_parameters(recipe: Recipe, cost: Cost, rank: int | None = None) -> int:
    """Of one LoRA of the recipe's rank, or of another; convolutions that it names are left out."""
    found = recipe.decouple.lora_targets or TARGETS.get(recipe.model.family, _JOINT)
    return (rank or recipe.decouple.lora_rank or 0) * _widths(cost, found)


def _widths(cost: Cost, targets: Sequence[str]) -> int:
    return sum(width for name, width in cost.linears.items() if any(f".{name}".endswith(f".{t}") for t in targets))
