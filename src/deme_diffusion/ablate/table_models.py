"""Rows of the parts table: what an expert is made of, and what it starts from."""

from __future__ import annotations

from collections.abc import Sequence

from deme_diffusion.ablate.rows import Change, Part, Replacement, Variant
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe

_DEFAULTS = Recipe().decouple


def _spatial(axes: str) -> Change:
    return {"decouple.projection_axes": axes}


def _partly_random(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    shares = [number.value for number in numbers if 0 < number.value < 1]
    change: Change = {"decouple.init": "partly_random"}
    return [("", {**change, "decouple.init_random_share": share}) for share in shares] or [("", change)]


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
        "learned channel projection",
        "projection matrices in the experts",
        "projection after blocks",
        "channel linear projection",
        "projection in experts",
        "learned projection",
        "projection matrix of blocks",
        "1x1 convolution",
        "channel matrix",
        "projection features",
        "feature projection",
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
        Replacement(
            "after every block",
            ("block", "after every block"),
            {"decouple.projection": "block"},
            pattern=r"^after (?:every|each|all) down\w*\W+(?:and )?(?:mid\w*\W+)?(?:and )?up\w* ?blocks?\b",
        ),
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
        "expert init",
        "init checkpoint",
        "starting point of the finetuning",
        "init of expert weights",
        "pretrained start",
        "pretrained starting point",
        "finetuning starting point",
        "init from scratch",
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

PARTS = (PROJECTION, SPATIAL, INIT)
