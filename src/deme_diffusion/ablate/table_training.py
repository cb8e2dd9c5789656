"""Rows of the parts table: the techniques that each expert is finetuned with, and how its timesteps are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from deme_diffusion.ablate import table_models
from deme_diffusion.ablate.matching import concepts
from deme_diffusion.ablate.rows import Numeric, Part, Replacement, Variant
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError

_DEFAULTS = Recipe().decouple
_OF_TEACHER = frozenset(["frozen", "pretrained", "teacher", "consistency", "expert", "weight", "loss", "?copy"])


def _when(active: bool, reason: str) -> str:
    return "" if active else reason


def _frozen(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    """The pretrained model, where the text says no more: any other model is none that the recipe has."""
    if any(letter.isdigit() for letter in text) or (more := sorted(frozenset(concepts(text)) - _OF_TEACHER)):
        said = (
            "with a number"
            if any(letter.isdigit() for letter in text)
            else f"of {', '.join(word.removeprefix('?') for word in more)}"
        )
        raise UserError(f"a teacher {said}? it is the recipe's own pretrained model, or a running average")
    return [("", {"decouple.teacher": "frozen"})]


TECHNIQUES = Part(
    name="all three techniques",
    description="the three of Sec. 3.1 and 3.2 together: probabilistic sampling, consistency loss, projection",
    path="decouple.global_prob",
    synonyms=(
        "three techniques",
        "three training techniques",
        "three finetuning techniques",
    ),
    off={"decouple.global_prob": 0.0, "decouple.consistency_weight": 0.0, "decouple.projection": "none"},
    on={
        "decouple.global_prob": _DEFAULTS.global_prob,
        "decouple.consistency_weight": _DEFAULTS.consistency_weight,
        "decouple.projection": _DEFAULTS.projection,
    },
    actions=("REMOVE", "ADD"),
    is_on=lambda recipe: (
        recipe.decouple.global_prob > 0
        and recipe.decouple.consistency_weight > 0
        and recipe.decouple.projection != "none"
    ),
)

GLOBAL = Part(
    name="probabilistic sampling",
    description="the share p of timesteps that an expert draws from all of [0, T) (Eq. 6)",
    path="decouple.global_prob",
    synonyms=(
        "probabilistic",
        "probabilistic timestep sampling",
        "p",
        "probability p",
        "global timesteps sampling",
        "timestep sampling",
        "probabilistic sampling of timestep ranges",
        "global probability",
        "global sampling",
        "sampling of timesteps from all ranges",
        "probability of global timesteps",
        "training timestep sampling",
        "timestep sampling of experts",
        "timestep range sampling",
        "finetuning timestep sampling",
        "probability of outside timesteps",
        "probability of timesteps outside the own range",
        "sampling timesteps from outside the range",
        "sampling outside the range",
        "global timesteps",
        "coin of global timesteps",
        "probability of full range",
        "timesteps of the full range",
        "timesteps from outside the own range",
        "probability expert timesteps",
        "mixed timesteps probability",
        "expert sampling of global timesteps",
        "share of global timesteps",
        "probabilistic sampling p",
    ),
    off={"decouple.global_prob": 0.0},
    on={"decouple.global_prob": _DEFAULTS.global_prob},
    is_on=lambda recipe: recipe.decouple.global_prob > 0,
    replacements=(
        Replacement(
            "always global",
            (
                "uniform global",
                "always",
                "global",
                "uniform over all timesteps",
                "global sampling",
                "uniform sampling of all timesteps",
            ),
            {"decouple.global_prob": 1.0},
        ),
        Replacement(
            "own range only",
            ("own", "only own range", "own timesteps only", "own sampling"),
            {"decouple.global_prob": 0.0},
        ),
    ),
    numeric=Numeric(
        lambda recipe, number: {"decouple.global_prob": number.of(recipe.decouple.global_prob)},
        ("p", "probability", "prob", "to", "ratio"),
        ("of", "global", "probabil", "timestep", "sampl", "chance", "full"),
        ("0.1", "p = 0.5"),
        "p = 0.5",
    ),
    also=("per-sample coin",),
)

CONSISTENCY = Part(
    name="consistency loss",
    description="the loss to the frozen pretrained model's prediction, and its weight (Eq. 5)",
    path="decouple.consistency_weight",
    synonyms=(
        "consistency",
        "consistency loss weight",
        "consistency with the teacher",
        "consistency loss lambda",
        "distillation loss",
        "teacher loss",
        "loss to the teacher",
        "consistency with the pretrained model",
        "lambda",
        "pretrained model regularization",
        "consistency loss with teacher",
        "distillation from pretrained",
        "distillation from the teacher",
        "distillation consistency",
        "consistency weight",
        "consistency loss with pretrained",
        "loss to the frozen pretrained model",
        "consistency with pretrained",
        "consistency with the teacher model",
        "consistency loss to teacher",
        "distillation loss to the teacher",
        "loss consistency to pretrained",
        "loss of deviation from teacher",
        "teacher matching loss",
        "regularization to the teacher",
        "pull to pretrained",
        "loss with frozen teacher",
        "consistency loss term",
        "consistency of experts with pretrained",
        "frozen pretrained loss",
        "distillation to the frozen teacher",
        "weight of the teacher loss",
        "regularization to the pretrained model",
    ),
    off={"decouple.consistency_weight": 0.0},
    on={"decouple.consistency_weight": _DEFAULTS.consistency_weight},
    is_on=lambda recipe: recipe.decouple.consistency_weight > 0,
    replacements=(
        Replacement(
            "EMA teacher",
            ("ema", "ema teacher", "ema student", "ema consistency"),
            {"decouple.teacher": "ema", "decouple.use_ema": True},
        ),
    ),
    numeric=Numeric(
        lambda recipe, number: {"decouple.consistency_weight": number.of(recipe.decouple.consistency_weight)},
        ("lambda", "weight", "w", "alpha", "beta", "coefficient"),
        ("weight", "consistenc", "lambda", "loss", "consistency"),
        ("0.1", "lambda = 0.5"),
        "lambda = 0.5",
    ),
)

TEACHER = Part(
    name="teacher",
    description="which model the consistency loss compares with: the frozen pretrained one, or a running average",
    path="decouple.teacher",
    synonyms=("teacher", "frozen teacher", "pretrained teacher", "frozen pretrained teacher", "teacher of consistency"),
    actions=("REPLACE",),
    replacements=(
        Replacement(
            "frozen",
            ("frozen", "pretrained", "pretrained teacher", "frozen pretrained model"),
            _frozen,
        ),
        Replacement(
            "EMA", ("ema", "ema of the student", "ema teacher"), {"decouple.teacher": "ema", "decouple.use_ema": True}
        ),
    ),
    also=("consistency loss",),
    needs=lambda recipe: _when(recipe.decouple.consistency_weight > 0, "the recipe has no consistency loss"),
)

ANTITHETIC = Part(
    name="antithetic timesteps",
    description="timesteps drawn in mirrored pairs, as the public script does",
    path="decouple.antithetic",
    synonyms=(
        "antithetic",
        "antithetic timesteps",
        "antithetic timestep sampling",
        "antithetic sampling of timesteps",
        "antithetic pairs",
        "antithetic timesteps in the range",
    ),
    actions=("REMOVE", "ADD"),
    off={"decouple.antithetic": False},
    on={"decouple.antithetic": True},
    is_on=lambda recipe: recipe.decouple.antithetic,
)

COIN = Part(
    name="per-sample coin",
    description="whether the coin of probabilistic sampling is flipped for each sample or for each batch",
    path="decouple.timestep_sampling",
    synonyms=(
        "per sample timesteps",
        "per batch timesteps",
        "per sample own or full range",
        "per sample",
        "per batch",
        "per batch probabilistic sampling",
        "per batch probabilistic",
        "per sample probabilistic sampling",
        "per batch timestep sampling",
        "coin per sample",
    ),
    actions=("REPLACE",),
    replacements=(
        Replacement("per sample", ("per sample", "per sample timesteps"), {"decouple.timestep_sampling": "per_sample"}),
        Replacement("per batch", ("per batch", "per batch timesteps"), {"decouple.timestep_sampling": "per_batch"}),
    ),
)
PARTS = (
    GLOBAL,
    CONSISTENCY,
    TEACHER,
    *table_models.PARTS,
    ANTITHETIC,
    COIN,
    TECHNIQUES,  # after the parts whose settings it sets
)
