"""Rows of the parts table: the techniques that each expert is finetuned with, and what it starts from."""

from __future__ import annotations

from collections.abc import Sequence

from deme_diffusion.ablate.rows import Change, Numeric, Part, Replacement, Variant
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe

_DEFAULTS = Recipe().decouple


def _when(active: bool, reason: str) -> str:
    return "" if active else reason


def _spatial(axes: str) -> Change:
    return {"decouple.projection_axes": axes}


def _partly_random(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    shares = [number.value for number in numbers if 0 < number.value < 1]
    change: Change = {"decouple.init": "partly_random"}
    return [("", {**change, "decouple.init_random_share": share}) for share in shares] or [("", change)]


TECHNIQUES = Part(
    name="finetuning techniques",
    description="the three of Sec. 3.1 and 3.2 together: probabilistic sampling, consistency loss, projection",
    path="decouple.global_prob",
    synonyms=(
        "training techniques",
        "three techniques",
        "all three",
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
            {"decouple.teacher": "frozen"},
        ),
        Replacement(
            "EMA", ("ema", "ema of the student", "ema teacher"), {"decouple.teacher": "ema", "decouple.use_ema": True}
        ),
    ),
    also=("consistency loss",),
    needs=lambda recipe: _when(recipe.decouple.consistency_weight > 0, "the recipe has no consistency loss"),
)

PROJECTION = Part(
    name="channel-wise projection",
    description="a learnable C x C matrix over the channels of feature maps, identity at start (Sec. 3.2)",
    path="decouple.projection",
    synonyms=(
        "projection",
        "channel projection",
        "channel",
        "channel projection layer",
        "projection placement",
        "channel projection of features",
        "identity channel projection",
        "residual projection",
        "block projection",
        "channel mixing",
    ),
    off={"decouple.projection": "none"},
    on={"decouple.projection": _DEFAULTS.projection},
    is_on=lambda recipe: recipe.decouple.projection != "none",
    replacements=(
        Replacement(
            "none", ("identity", "fixed identity", "identity without projection"), {"decouple.projection": "none"}
        ),
        Replacement("after residual branches", ("residual", "residual placement"), {"decouple.projection": "residual"}),
        Replacement("after every block", ("block", "after every block"), {"decouple.projection": "block"}),
        Replacement(
            "spatial", ("spatial", "depthwise 3x3 convolution", "spatial depthwise projection"), _spatial("spatial")
        ),
        Replacement(
            "channel and spatial",
            (
                "both channel and spatial",
                "both",
                "both spatial",
                "both depthwise",
                "joint channel and spatial",
                "spatial and channel",
            ),
            _spatial("both"),
        ),
        Replacement("channel", ("channel", "channel only", "own channel"), _spatial("channel")),
    ),
    beside={"spatial": "channel and spatial"},
    also=("spatial projection",),
)

SPATIAL = Part(
    name="spatial projection",
    description="a depthwise 3x3 convolution beside the channel-wise projection, identity at start",
    path="decouple.projection_axes",
    synonyms=("spatial projection", "spatial projection beside channel", "both spatial and channel projection"),
    off={"decouple.projection_axes": "channel"},
    on={"decouple.projection_axes": "both"},
    actions=("REMOVE", "ADD"),
    is_on=lambda recipe: recipe.decouple.projection != "none" and recipe.decouple.projection_axes != "channel",
)

INIT = Part(
    name="initialisation",
    description="what the experts start from",
    path="decouple.init",
    synonyms=(
        "init",
        "initialisation of the experts",
        "pretrained",
        "pretrained init",
        "pretrained initialisation of experts",
        "expert init from pretrained",
        "finetuning from pretrained",
        "init of finetuning",
        "training from pretrained",
        "pretrained experts",
        "init of single models",
        "shared init",
        "scratch",
    ),
    off={"decouple.init": "random"},
    on={"decouple.init": "pretrained"},
    is_on=lambda recipe: recipe.decouple.init != "random",
    replacements=(
        Replacement("pretrained", ("pretrained", "pretrained init"), {"decouple.init": "pretrained"}),
        Replacement("EMA", ("ema", "ema init", "pretrained ema"), {"decouple.init": "ema"}),
        Replacement(
            "partly random", ("partly", "partly random", "partly pretrained", "partly scratch"), _partly_random
        ),
        Replacement("random", ("random", "scratch", "random start", "training scratch"), {"decouple.init": "random"}),
    ),
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
    ),
    actions=("REMOVE", "ADD"),
    off={"decouple.antithetic": False},
    on={"decouple.antithetic": True},
    is_on=lambda recipe: recipe.decouple.antithetic,
)

COIN = Part(
    name="timestep coin",
    description="whether the coin of probabilistic sampling is flipped for each sample or for each batch",
    path="decouple.timestep_sampling",
    synonyms=(
        "per sample timesteps",
        "per batch timesteps",
        "per sample",
        "per batch",
        "per batch probabilistic sampling",
        "per batch probabilistic",
        "per sample probabilistic sampling",
        "per batch timestep sampling",
        "coin flip",
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
    PROJECTION,
    SPATIAL,
    INIT,
    ANTITHETIC,
    COIN,
    TECHNIQUES,  # after the parts whose settings it sets
)
