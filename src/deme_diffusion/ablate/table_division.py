"""Rows of the parts table: how many experts there are, and which timesteps each is trained on."""

from __future__ import annotations

from deme_diffusion.ablate.rows import Change, Numeric, Part, Replacement
from deme_diffusion.ablate.saying_ranges import (
    RANDOM_ASSIGNMENT,
    RANDOM_BOUNDARIES,
    nonuniform,
    overlapping,
    random,
    unsaid,
)
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError

ONE_MODEL: Change = {"decouple.num_ranges": 1, "merge.method": "none", "merge.search": "none"}
"""One model finetuned on all timesteps with the whole budget: nothing is left to be merged."""


def whole(number: Number, what: str) -> int:
    """The number as a count. Raises UserError for one that is none."""
    if number.value != int(number.value) or not 1 <= number.value < 1e12:
        raise UserError(f"{number.value:g} is no number of {what}")
    return int(number.value)


def _count(recipe: Recipe, number: Number) -> Change:
    value = number.of(recipe.decouple.num_ranges)
    count = whole(Number(value), "experts")
    return ONE_MODEL if count == 1 else {"decouple.num_ranges": count}


def _overlap(recipe: Recipe, number: Number) -> Change:
    """A share is an overlap, a whole number one of ranges."""
    if number.kind == "percent" or 0 < number.value < 1:
        return {"decouple.division": "overlapping", "decouple.overlap": number.value}
    return _count(recipe, number)


DECOUPLING = Part(
    name="decoupling",
    description="N experts, each finetuned on its own timesteps; without it, one model is finetuned on all of them",
    path="decouple.num_ranges",
    synonyms=(
        "decouple",
        "number of ranges",
        "number of experts",
        "number of timestep ranges",
        "number N",
        "number of merged experts",
        "N",
        "experts",
        "decoupled finetuning by timestep range",
        "decoupled experts",
        "number of expert splits",
        "separate finetuning of experts for timestep ranges",
        "finetuning experts",
        "number of segments",
        "number of timestep clusters",
        "number of splits",
        "decoupled finetuning",
        "decoupled training N",
        "decoupled training on timestep ranges",
        "number of timestep splits",
        "number of clusters",
        "experts for timesteps",
        "experts for timestep ranges",
        "number of range experts N",
        "number of decoupled ranges",
        "decoupled timesteps",
        "number of decoupled experts",
        "expert decoupling",
        "decoupled single",
        "number of ranges N",
        "N experts",
        "finetuning of experts for ranges",
        "split of training into experts",
        "how many experts",
        "separate experts",
        "one expert per range",
        "one expert for each timestep range",
        "split of timesteps into separately finetuned ranges",
        "number of merged models",
        "number of timestep experts",
    ),
    off=ONE_MODEL,
    on={"decouple.num_ranges": 4},
    is_on=lambda recipe: recipe.decouple.num_ranges > 1,
    replacements=(
        Replacement(
            "one model",
            (
                "single",
                "single model on all timesteps",
                "one expert",
                "finetuning on all timesteps",
                "single range",
                "single expert",
                "training on all timesteps",
                "joint training",
                "finetune globally",
            ),
            ONE_MODEL,
        ),
    ),
    numeric=Numeric(
        _count,
        ("n", "k", "num", "m"),
        (
            "expert",
            "rang",
            "range",
            "split",
            "segment",
            "model",
            "interval",
            "subset",
            "cluster",
            "bin",
            "group",
            "partit",
            "subrang",
            "specialist",
            "equal",
            "uniform",
            "finetun",
            "part",
            "stage",
            "chunk",
            "decoupl",
            "contiguou",
            "nonoverlapp",
            "separat",
        ),
        ("2, 8, 16 experts", "N = 8"),
        "N = 3",
    ),
    also=("division", "multi-task weighting"),
)
DIVISION = Part(
    name="division",
    description="how [0, T) is cut into N subsets",
    path="decouple.division",
    synonyms=(
        "timestep division",
        "range division",
        "split of the timesteps into ranges",
        "timestep ranges",
        "split",
        "uniform timestep division",
        "uniform ranges",
        "uniform timestep ranges",
        "contiguous timestep ranges",
        "contiguous timesteps",
        "range boundaries",
        "timestep boundaries",
        "boundaries",
        "timestep clustering",
        "uniform division",
        "ranges",
        "timestep range boundaries",
        "nonoverlapping timestep ranges",
        "timestep range splitting",
        "contiguous ranges",
        "range assignment",
        "timestep assignment",
        "uniform split into contiguous ranges",
        "timestep assignment to experts",
        "assignment of timesteps ranges to experts",
        "nonuniform ranges",
        "cluster",
        "width of timestep ranges",
        "uniform contiguous timestep division",
        "equal nonoverlapping timestep ranges",
        "overlap of timestep ranges",
        "overlap between ranges",
        "division among experts",
        "split of timesteps among experts",
        "assignment of timesteps",
        "boundaries between ranges",
        "boundaries of experts",
        "split into ranges",
        "assign timesteps to experts",
        "disjoint timesteps",
        "disjoint ranges",
        "disjoint range boundaries",
        "split points",
        "hard boundaries",
        "overlap degree",
        "time split into uniform ranges",
        "overlap ratio",
        "split of the full range into uniform segments",
    ),
    actions=("REMOVE", "REPLACE"),
    off=ONE_MODEL,
    is_on=lambda recipe: recipe.decouple.num_ranges > 1,
    replacements=(
        Replacement("uniform", ("uniform", "uniform division", "uniform in time"), {"decouple.division": "uniform"}),
        Replacement("overlapping", ("overlap", "overlap between neighbours"), overlapping),
        Replacement(
            "random boundaries",
            (
                "random boundary",
                "random range boundaries",
                "random contiguous ranges",
                "random contiguous",
                "random width",
            ),
            RANDOM_BOUNDARIES,
        ),
        Replacement(
            "random assignment",
            (
                "random assignment",
                "noncontiguous",
                "random assignment to experts",
                "random noncontiguous subsets",
                "noncontiguous assignment",
                "random assignment of ranges",
            ),
            RANDOM_ASSIGNMENT,
        ),
        Replacement("random", ("random",), random, "random in either sense: boundaries, and assignment", several=True),
        Replacement(
            "log-SNR-uniform",
            (
                "snr",
                "uniform snr",
                "equal snr range",
                "snr boundaries",
                "logarithmic snr",
                "snr based nonuniform",
                "snr adaptive",
            ),
            {"decouple.division": "log_snr"},
        ),
        Replacement(
            "non-uniform",
            ("nonuniform", "nonuniform boundaries"),
            nonuniform,
            "without edges: log-SNR-uniform, whose ranges have unequal widths",
        ),
        Replacement(
            "gradient similarity",
            (
                "gradient",
                "gradient cluster",
                "adaptive gradient",
                "adaptive boundaries by gradient",
                "adaptive",
                "adaptive clustering by gradient",
                "nonuniform gradient",
                "adaptive boundaries",
                "adaptive split",
                "nonuniform adaptive gradient",
            ),
            {"decouple.division": "gradient_similarity"},
        ),
        Replacement(
            "explicit edges",
            ("explicit boundaries", "manual boundaries", "given boundaries"),
            unsaid,
            pattern=r"\b(?:cut|boundar|edge|border|threshold|breakpoint|delimit)\w*\b[^\d%]{0,20}\d+(?![\d.%])"
            r"|\bat (?:t|timestep)\s*=?\s*\d+|[\[(]\s*\d+\s*[,;-]\s*\d+\s*[\])]|\b0\s*-\s*\d+\s*,",
            example="boundaries at 5, 10",
        ),
        Replacement(
            "finer or coarser ranges",
            ("finer", "nonuniform finer", "logarithmic", "nonuniform logarithmic"),
            unsaid,
            "with edges",
            example="finer ranges: [0, 3), [3, 10), [10, 20)",
        ),
    ),
    numeric=Numeric(_overlap, ("overlap", "ratio"), ("overlap",), ("25%",), "25%"),
    exact=True,
    also=("decoupling",),
)
PARTS = (DECOUPLING, DIVISION)
