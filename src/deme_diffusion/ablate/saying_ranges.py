"""What texts say of how the timesteps are divided: overlaps, random divisions, and where ranges begin."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deme_diffusion.ablate.matching import concepts
from deme_diffusion.ablate.rows import Change, Variant
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError

RANDOM_BOUNDARIES: Change = {"decouple.division": "random_boundaries"}
RANDOM_ASSIGNMENT: Change = {"decouple.division": "random_assignment"}
_RANGES = ("rang", "range", "interval", "segment", "bin", "subset", "expert", "part", "specialist", "model", "chunk")
_ONE_BY_ONE = re.compile(r"\b(?:each|every|single|individual) (?:single |individual )?timestep\b|\bindividually\b")


def overlapping(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    division: Change = {"decouple.division": "overlapping"}
    shares = [number.value for number in numbers if 0 < number.value <= 1]
    if not shares and any(number.symbol == "overlap" or number.after in ("timestep", "overlap") for number in numbers):
        raise UserError("an overlap is a share of a range's width, 0 to 1, as 25%")
    if len(shares) == 1:
        return [("", {**division, "decouple.overlap": shares[0]})]
    return [(f"overlap {share:g}", {**division, "decouple.overlap": share}) for share in shares] or [("", division)]


def random(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    """Where it is not said in which sense: both."""
    said = frozenset(concepts(text.replace("(", " ").replace(")", " ")))
    if ("assign" in said or _ONE_BY_ONE.search(text)) and "boundary" not in said:
        return [("", RANDOM_ASSIGNMENT)]
    if "boundary" in said and "assign" not in said:
        return [("", RANDOM_BOUNDARIES)]
    return [("random boundaries", RANDOM_BOUNDARIES), ("random assignment", RANDOM_ASSIGNMENT)]


def edges_of(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
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


def unsaid(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    if _says_edges(text, numbers):
        return edges_of(recipe, text, numbers)
    counts = [number for number in numbers if number.after in _RANGES and number.kind == "plain" and number.value > 1]
    if len(counts) == 1 and counts[0].value == int(counts[0].value):
        return [("", {"decouple.num_ranges": int(counts[0].value)})]
    raise UserError("which ranges? say the timesteps at which they begin, as [0, 100), [100, 300), [300, 1000)")


def nonuniform(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
    """Without edges: equal in log-SNR, the usual measure of noise, whose ranges of timesteps have unequal widths."""
    if _says_edges(text, numbers):
        return edges_of(recipe, text, numbers)
    return [("", {"decouple.division": "log_snr"})]
