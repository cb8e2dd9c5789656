"""What texts say of single experts: one of several, which no setting is, and values told for each range in order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deme_diffusion.ablate.rows import Choice, Part
from deme_diffusion.ablate.text import Number, numbers
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError

ONE_OF_SEVERAL = "it speaks of single experts, and a setting is of all alike; name what all of them have"
_EXPERT = r"(?:expert|specialist|sub-?model)"
_NET = r"(?:expert|specialist|(?:sub-?)?model|network|denoiser|checkpoint)"
_NUMBERED = r"(?:first|second|third|fourth|fifth|last|\d+(?:st|nd|rd|th))"
_ONE = re.compile(
    rf"\b{_NUMBERED} (?:\w+ )?{_EXPERT}s?\b"
    rf"|\b{_EXPERT}s? (?:no\.? ?|number |#)?\d+\b"
    rf"|\b(?:early|late|low|high|middle|noisy|noisiest|cleanest)[\w-]*(?: \w+)? {_EXPERT}\b(?!s| (?:per|for each))"
    rf"|\b{_NET}\b(?!s)[^\[(]{{0,30}}[\[(](?!0, ?t[\])])[^\[\]()]*\d[^\[\]()]*,[^\[\]()]*[\])]"
    rf"|^(?:the |a single )?{_EXPERT} (?:for|of|on|in|at|with|covering|responsible|trained|finetuned|fine-tuned|that)\b"
    r"(?!.*\b(?:each|every|per|any|all)\b)",
    re.IGNORECASE,
)
_EXPLAINING = re.compile(r"\bi\.\s?e\b|\be\.\s?g\b|\bsuch as\b", re.IGNORECASE)
_COUNT = re.compile(r"\b(?:number|count) of\b|\bhow many\b|#|\beach\b|\bevery\b", re.IGNORECASE)
_LOW = r"(?:small(?:est)?|low(?:est)?|clean(?:est)?)"
_HIGH = r"(?:large(?:st)?|high(?:est)?|noisy|noisiest|big(?:gest)?)"
_UP, _DOWN = re.compile(rf"\bfrom {_LOW}\b.*\bto {_HIGH}\b"), re.compile(rf"\bfrom {_HIGH}\b.*\bto {_LOW}\b")
_ORDERED = re.compile(
    rf"{_UP.pattern}|{_DOWN.pattern}|\brespectively\b|\bin (?:this |that |the same |range )?order\b(?! (?:of|to)\b)"
    r"|\bfor (?:the )?(?:others?|rest|remaining|second|last|late)\b|\bfrom (?:early|late|first|last)\b.*\bto\b"
)
_UNSURE = re.compile(r"\bfrom (?:early|late)\b|snr")
_THINGS = ("expert", "model", "range", "rang", "network", "specialist", "segment", "interval", "first", "last", "other")


def one_of_several(text: str) -> bool:
    """Whether a text, as its author wrote it, names an expert by its number, its range, or its noise."""
    text = _EXPLAINING.split(text)[0]
    return _ONE.search(text) is not None and not _COUNT.search(text)


def in_order(part: Part, text: str, recipe: Recipe) -> Choice | None:
    """The arm of a normalised text that tells a value for each range in their order, None for one that does not.

    Raises UserError where the part has one value for all, and where values are not one a range.
    """
    found = [number for number in numbers(text) if number.after not in _THINGS]
    if len(found) < 2 or not _ORDERED.search(text) or part.path == "decouple.num_ranges":
        return None
    if not part.path.startswith(("decouple.", "merge.")) or part.path == "decouple.division":
        return None
    if not part.each:
        raise UserError(f"a value for each range, and {part.name} is one for all; an entry for each value is needed")
    if _UNSURE.search(text) and not (_UP.search(text) and "snr" not in text):
        raise UserError("in which order? say `from small t to large t`, or the reverse")
    return Choice({part.each: _values(part, found, recipe, bool(_DOWN.search(text)))}, 1.0, needs=part.needs(recipe))


def _values(part: Part, found: Sequence[Number], recipe: Recipe, falling: bool) -> list[float]:
    """The values in the order of the ranges, which begin at t = 0."""
    count = recipe.decouple.num_ranges
    if len(found) != count or any(number.kind != "plain" for number in found):
        raise UserError(f"{part.name} of each range: {count} plain numbers are needed, one a range")
    values = [int(n.value) if part.each == "decouple.range_steps" else n.value for n in found]
    return values[::-1] if falling else values
