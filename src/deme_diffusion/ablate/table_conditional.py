"""Rows of the parts table: experts as LoRA, and what only models that take text or classes have."""

from __future__ import annotations

from collections.abc import Sequence

from deme_diffusion.ablate.rows import Change, Numeric, Part, Replacement, Variant
from deme_diffusion.ablate.table_division import whole
from deme_diffusion.ablate.table_sampling import first_sampler
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError

RANK = 16
"""Of a LoRA where a plan names none."""
DROPOUT = 0.1


def _lora(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    ranks = [whole(number, "ranks") for number in numbers if number.kind == "plain" and number.value >= 1]
    ranks = ranks or [recipe.decouple.lora_rank or RANK]
    several = len(ranks) > 1
    return [(f"LoRA of rank {rank}" if several else "", {"decouple.lora_rank": rank}) for rank in ranks]


def _rank(recipe: Recipe, number: Number) -> Change:
    if number.kind != "plain" and recipe.decouple.lora_rank is None:
        raise UserError("a share of which rank? The recipe's experts are finetuned whole; say the rank itself")
    rank = number.of(recipe.decouple.lora_rank or 0)
    return {"decouple.lora_rank": whole(Number(float(round(rank)) if number.kind != "plain" else rank), "ranks")}


def _conditional(recipe: Recipe) -> str:
    return "" if recipe.model.takes != "nothing" else f"family {recipe.model.family} takes no prompts"


def _guidance(recipe: Recipe, number: Number) -> Change:
    scale = number.of(recipe.evaluate.samplers[0].guidance_scale or 1.0)
    if scale < 0:
        raise UserError(f"a guidance scale of {scale:g}? It is 0 or more, and 1 guides nothing")
    return first_sampler(recipe, guidance_scale=scale)


def _unguided(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    return [("", first_sampler(recipe, guidance_scale=1.0))]


LORA = Part(
    name="LoRA",
    description="experts as low-rank adapters beside the base, instead of finetuning all weights",
    path="decouple.lora_rank",
    synonyms=(
        "lora",
        "lora experts",
        "lora finetuning",
        "lora rank",
        "rank of the lora",
        "full parameter finetuning",
        "full parameter finetuning of the experts",
        "lora of the experts",
    ),
    off={"decouple.lora_rank": None},
    on={"decouple.lora_rank": RANK},
    is_on=lambda recipe: recipe.decouple.lora_rank is not None,
    replacements=(
        Replacement("LoRA", ("lora finetuning", "lora rank", "lora experts"), _lora, example="LoRA of rank 2"),
        Replacement(
            "full finetuning",
            ("full parameter", "full parameter finetuning", "full finetuning of experts"),
            {"decouple.lora_rank": None},
        ),
    ),
    numeric=Numeric(
        _rank, ("r", "rank", "to"), ("rank", "lora", "dimension", "of", "the"), ("rank 8", "r = 64"), "rank 4"
    ),
)
DROPOUT_OF_TEXT = Part(
    name="text dropout",
    description="the share of samples trained without caption or class, which classifier-free guidance needs",
    path="decouple.proportion_empty_prompts",
    synonyms=(
        "text dropout",
        "text dropout probability",
        "text dropout rate",
        "text dropout for guidance",
        "text dropout in training",
        "training for guidance",
    ),
    off={"decouple.proportion_empty_prompts": 0.0},
    on={"decouple.proportion_empty_prompts": DROPOUT},
    is_on=lambda recipe: recipe.decouple.proportion_empty_prompts > 0,
    numeric=Numeric(
        lambda recipe, number: {
            "decouple.proportion_empty_prompts": number.of(recipe.decouple.proportion_empty_prompts or DROPOUT)
            if number.kind != "percent"
            else number.value
        },
        ("p", "rate", "dropout", "to"),
        ("dropout", "drop", "caption", "prompt", "text", "sampl", "of", "the"),
        ("0.2", "10%"),
        "0.2",
    ),
    needs=_conditional,
)
GUIDANCE = Part(
    name="guidance scale",
    description="classifier-free guidance of the recipe's first sampler",
    path="evaluate.samplers",
    synonyms=("guidance", "guidance strength", "guidance of sampling", "sampling guidance", "guidance value"),
    actions=("REPLACE",),
    replacements=(
        Replacement("no guidance", ("without guidance", "unguided"), _unguided),
    ),
    numeric=Numeric(
        _guidance, ("w", "s", "scale", "guidance", "cfg", "to"), ("scale", "guidanc", "cfg", "the", "of"),
        ("5, 7.5, 10", "3"), "3",
    ),
    needs=_conditional,
)  # fmt: skip
PARTS = (LORA, DROPOUT_OF_TEXT, GUIDANCE)
