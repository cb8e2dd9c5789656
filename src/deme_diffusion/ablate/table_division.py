"""Rows of the parts table: how many experts there are, and which timesteps each is trained on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deme_diffusion.ablate.matching import concepts
from deme_diffusion.ablate.rows import Change, Numeric, Part, Replacement, Variant
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError

ONE_MODEL: Change = {"decouple.num_ranges": 1, "merge.method": "none", "merge.search": "none"}
"""One model finetuned on all timesteps with the whole budget: nothing is left to be merged."""
RANDOM_BOUNDARIES: Change = {"decouple.division": "random_boundaries"}
RANDOM_ASSIGNMENT: Change = {"decouple.division": "random_assignment"}


def whole(number: Number, what: str) -> int:
    """The number as a count. Raises UserError for one that is none."""
    if number.value != int(number.value) or not 1 <= number.value < 1e12:
        raise UserError(f"{number.value:g} is no number of {what}")
    return int(number.value)


def _count(recipe: Recipe, number: Number) -> Change:
    value = number.of(recipe.decouple.num_ranges)
    count = whole(Number(value), "experts")
    return ONE_MODEL if count == 1 else {"decouple.num_ranges": count}


def _overlapping(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    division: Change = {"decouple.division": "overlapping"}
    shares = [number.value for number in numbers if 0 < number.value <= 1]
    if not shares and any(number.symbol == "overlap" or number.after in ("timestep", "overlap") for number in numbers):
        raise UserError("an overlap is a share of a range's width, 0 to 1, as 25%")
    if len(shares) == 1:
        return [("", {**division, "decouple.overlap": shares[0]})]
    return [(f"overlap {share:g}", {**division, "decouple.overlap": share}) for share in shares] or [("", division)]


def _random(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    """Where it is not said in which sense: both."""
    said = frozenset(concepts(text.replace("(", " ").replace(")", " ")))
    if "assign" in said and "boundary" not in said:
        return [("", RANDOM_ASSIGNMENT)]
    return [("random boundaries", RANDOM_BOUNDARIES), ("random assignment", RANDOM_ASSIGNMENT)]


def _edges(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    """Edges as they are written: intervals, or the timesteps at which a new range begins."""
    found = re.findall(r"(\d+)\s*(?:,|-|to|;|<=?\s*t\s*<=?)\s*(\d+)", text)
    intervals = bool(re.search(r"[\[(]\s*\d+\s*[,;-]\s*\d+\s*[\])]", text)) or (len(found) > 1 and "-" in text)
    if intervals:
        starts = [int(low) for low, _ in found]
        edges = sorted({start for start in starts if start > 0})
    else:
        edges = [int(value) for value in re.findall(r"(?<![\d.])\d+(?![\d.%])", re.sub(r"(?<=\d),(?=000\b)", "", text))]
    edges = [edge for edge in edges if edge > 0]
    if not edges:
        raise UserError("where do ranges begin? say the timesteps, as [0, 100), [100, 300), [300, 1000)")
    change = {"decouple.division": "explicit", "decouple.edges": edges, "decouple.num_ranges": len(edges) + 1}
    return [("", change)]


def _says_edges(text: str, numbers: Sequence[Number]) -> bool:
    above = [number for number in numbers if number.value > 1]
    return len(above) > 1 or re.search(r"[\[(]\s*0\s*[,-]|\bat (?:t|timestep)\s*=?\s*\d", text) is not None


def _overlap(recipe: Recipe, number: Number) -> Change:
    """A share is an overlap, a whole number one of ranges."""
    if number.kind == "percent" or 0 < number.value < 1:
        return {"decouple.division": "overlapping", "decouple.overlap": number.value}
    return _count(recipe, number)


def _unsaid(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    if _says_edges(text, numbers):
        return _edges(recipe, text, numbers)
    raise UserError("which ranges? say the timesteps at which they begin, as [0, 100), [100, 300), [300, 1000)")


def _nonuniform(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    """Without edges: equal in log-SNR, the usual measure of noise, whose ranges of timesteps have unequal widths."""
    if _says_edges(text, numbers):
        return _edges(recipe, text, numbers)
    return [("", {"decouple.division": "log_snr"})]


def _one_model(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    return [("", ONE_MODEL)]


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
        "overlap ratio",
        "split of the full range into uniform segments",
    ),
    actions=("REMOVE", "REPLACE"),
    off=ONE_MODEL,
    is_on=lambda recipe: recipe.decouple.num_ranges > 1,
    replacements=(
        Replacement("uniform", ("uniform", "uniform division", "uniform in time"), {"decouple.division": "uniform"}),
        Replacement("overlapping", ("overlap", "overlap between neighbours"), _overlapping),
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
        Replacement("random", ("random",), _random, "random in either sense: boundaries, and assignment"),
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
            _nonuniform,
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
            ("boundaries", "explicit boundaries", "manual boundaries"),
            _unsaid,
            pattern=r"\bat (?:t|timestep)\s*=?\s*\d+|[\[(]\s*\d+\s*[,;-]\s*\d+\s*[\])]|\b0\s*-\s*\d+\s*,",
            example="boundaries at 5, 10",
        ),
        Replacement(
            "finer or coarser ranges",
            ("finer", "nonuniform finer", "logarithmic", "nonuniform logarithmic"),
            _unsaid,
            "with edges",
            example="finer ranges: [0, 3), [3, 10), [10, 20)",
        ),
    ),
    numeric=Numeric(_overlap, ("overlap", "ratio"), ("overlap",), ("25%",), "25%"),
    exact=True,
    also=("decoupling",),
)
PARTS = (DECOUPLING, DIVISION)
