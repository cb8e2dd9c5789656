"""What one replacement text means for a part: a change, several, or none and what the part takes. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from deme_diffusion.ablate.foreign import FOREIGN
from deme_diffusion.ablate.matching import LOOSE, MARGIN, concepts, meaning, ranked, score, tagged
from deme_diffusion.ablate.parts import family
from deme_diffusion.ablate.rows import Change, Choice, Meant, Part, Replacement
from deme_diffusion.ablate.saying_experts import in_order
from deme_diffusion.ablate.text import Number, normalised, numbers
from deme_diffusion.ablate.vocabulary_foreign import FOREIGN as FOREIGN_WORDS
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.recipes import changed

STRANGE = frozenset(FOREIGN_WORDS) | {"othermtl", "othermerge", "randomsearch", "distill", "lossweighting"}
CHANGES = frozenset(["minsnr", "ptwo", "snrplusone", "truncatedsnr", "scratch", "uncertainty", "nash"])
CHANGES |= {"ties", "dare", "fisher", "slerp"}
"""Changes of their own: a replacement of another part that names one besides means both, which no arm here is."""
FOREIGN_PENALTY = 0.3
"""A text with a word for what is no part of the method is taken only where all else fits."""
PATTERN = 0.99
"""The score of a text that holds a replacement's pattern."""
SURE = 0.9
"""A text that fits one replacement so well names no other."""
NAMED = 0.75
"""A part's text that fits a replacement so well speaks of that value."""
_SYMBOLS = frozenset(re.findall(r"\w+", "n p t k m w b s lambda gamma eta alpha beta lr seed cfg steps"))
_QUANTITIES = frozenset(["length", "batch", "samplingsteps", "lr"])
_DOING = ("finetun", "train", "decoupl", "separat")
"""A number told with a quantity belongs to that; what is done with a thing is no unit, the thing comes after."""
_ASSIGNED = re.compile(r"^(?:with |use |set )?[a-z]+ ?(?:=|:|in\b|∈)")
_JOINING = ("", "or", "and", "to", "versus", "vs", "e", "per", "for", "with", "in", "at", "instead", "each")
_BREAK = re.compile(r"\s*(?:,|;|/|\||&|\bor\b|\band\b|\bversus\b|\bsuchas\b)\s*")
_THEN = re.compile(r"[\s,;]*(?:\band )?\b(?:followed by|then|afterwards|and after that)\b")
_EACH = re.compile(
    r"\b(?:per|each|every)[ -](?:\w+ )?(?:expert|range|model|segment|subset|specialist|branch|partition)"
)
_REASONS = re.compile(r"\s-{1,3}\s|[:;]|\b(?:because|since|so that|which|where)\b")
_VARYING = re.compile(
    r"anneal|gradual|linearly|ramp|schedul|dynamic|progressiv|over (?:training|time)|time-var|adaptive|learn(?:ed|able)"
)
_MOVING = re.compile(
    r"\breassign|\bdynamic|\bduring (?:training|finetun)|\bover (?:the )?(?:course of )?(?:training|finetun)"
    r"|\bprogressive|\bas training|\brestarts?\b|\bgradual|\banneal(?:ed)? from|\bramp"
    r"|\b(?:first|last|second) (?:half|part|third) of"
)
"""What changes while it is trained: no setting does, but the learning rate."""
_OFF = re.compile(r"^(?:none|nothing|off|disabled?|remov(?:ed?|ing)|no|without|not using|omit(?:ted)?)\b")
_BASELINE = re.compile(r"^(?:the )?(?:baseline|original|default|current|unchanged)\b")
_INSTEAD = re.compile(
    r"\b(?:instead of|rather than|in place of|as opposed to|in lieu of|unlike|compared (?:to|with))\b"
)
_SWAP = re.compile(r"^(?:replace|replacing|replaced|substitute|swap|switch)\b.*?\b(?:with|by|for|to)\b\s*(?P<new>.+)$")


@dataclass(frozen=True)
class _Fit:
    part: Part
    replacement: Replacement
    score: float = field(default=0.0)


def takes(part: Part) -> tuple[str, ...]:
    """What may stand in a part's place, that of related parts included, for people."""
    return tuple(dict.fromkeys(name for row in family(part) for name in row.takes))


def meant(part: Part, text: str, recipe: Recipe, context: str = "") -> Meant:
    """The changes that a replacement text means for a part; `context` is what the ablation says of it elsewhere."""
    wording = wanted(normalised(text))
    if not wording:
        return Meant(reason=f"an empty replacement; {part.name} takes {'; '.join(takes(part))}", nearest=takes(part))
    if off := _off(part, wording):
        return off
    if _MOVING.search(wording) and "gradient" not in wording:
        return _unknown(part, text, wording)
    try:
        each = bool(_EACH.search(f"{normalised(context)} ; {wording}"))
        choices = tuple(_choices(part, wording, recipe, each))
    except UserError as error:
        return Meant(reason=str(error), nearest=takes(part)[:5], score=_best(part, wording))
    return Meant(choices, score=choices[0].score) if choices else _unknown(part, text, wording)


def value_of(part: Part, text: str, context: str) -> str:
    """A text that tells no more than a number, with the name of the value that `context` surely speaks of."""
    said = normalised(text)
    fits = [fit for fit in _fits(part, normalised(context)) if callable(fit.replacement.change)]
    if not numbers(said) or frozenset(concepts(said)) - {"gamma"} or not fits or fits[0].score < NAMED:
        return ""
    return f"{fits[0].replacement.name} {text}"


def wanted(text: str) -> str:
    """A normalised text without what it is to replace: `X instead of Y` and `replace Y with X` are X."""
    if match := _SWAP.match(text):
        return match["new"].strip()
    text = re.split(r"\s*(?:-+>|=>|→)\s*", text)[-1] or text
    before, *after = _INSTEAD.split(text, maxsplit=1)
    if after and not concepts(before) and "," in after[0]:
        return after[0].partition(",")[2].strip()  # instead of Y, use X
    return before.strip() if concepts(before) or numbers(before) else text.strip()


def _off(part: Part, text: str) -> Meant | None:
    rest = frozenset(concepts(text)) - part.field
    if _OFF.match(text) and not rest and not numbers(text) and "REMOVE" in part.actions:
        return Meant((Choice(part.off, 1.0, "removed"),), score=1.0)
    if _BASELINE.match(text) and not rest and not numbers(text):
        return Meant((Choice({}, 1.0),), score=1.0)
    return None


def _choices(part: Part, text: str, recipe: Recipe, each: bool) -> Iterator[Choice]:
    """One replacement that fits well; several that the text lists; numbers; one that fits well enough."""
    if ordered := in_order(part, text, recipe):
        yield ordered
        return
    fits = _fits(part, text)
    best = fits[0].score if fits else 0.0
    if _by_symbol(part, text) and (numeric := list(_numeric(part, text, recipe, each))):
        yield from numeric
        return
    listed = [] if best >= SURE else _listed(part, text)
    if len(listed) > 1:
        for piece, fit in listed:
            yield from _of(fit, piece, recipe, name=True)
        return
    reads = best >= LOOSE.least and (
        best >= SURE or callable(fits[0].replacement.change) or not _own_numbers(part, text, strict=True)
    )
    if not reads and (numeric := list(_numeric(part, text, recipe, each))):
        yield from numeric
    elif best >= LOOSE.least:
        rivals = [fit for fit in fits if best - fit.score < MARGIN and fit.part is fits[0].part]
        rivals = [fit for fit in rivals if fit.score == PATTERN] or rivals
        rivals = [fit for fit in rivals if not any(_within(fit, other) for other in rivals)]
        if len(rivals) > 1:
            names = " or ".join(fit.replacement.name for fit in rivals)
            raise UserError(f"it could be {names}; give each an entry of its own")
        joined = {} if best >= SURE else _joined(fits, recipe, text)
        for choice in _of(rivals[0], text, recipe):
            yield replace(choice, change={**joined, **choice.change})


def _fits(part: Part, text: str) -> list[_Fit]:
    """The replacements that fit a text, the best first; of equals, the part's own before related parts'."""
    rows = {row.name: row for row in family(part)}
    own = {name: (part.field | row.field) - _telling(part) for name, row in rows.items()}
    named = frozenset(tag.concept for tag in tagged(text) if not tag.later)
    strange = FOREIGN_PENALTY if named & (STRANGE - part.field | (CHANGES - _telling(part))) else 0.0
    found = [
        _Fit(row, one, PATTERN if one.pattern and re.search(one.pattern, text) else score(text, one.names, own[name]))
        for name, row in rows.items()
        for one in row.replacements
    ]
    found = [replace(fit, score=fit.score - strange - _ignored(fit, named)) for fit in found]
    return sorted((fit for fit in found if fit.score > 0), key=lambda fit: -fit.score)


def _ignored(fit: _Fit, named: frozenset[str]) -> float:
    """The penalty for a reading that leaves out a change with a name of its own, as NashMTL."""
    said = frozenset().union(*map(meaning, fit.replacement.names))
    return 0.0 if fit.part.joins or fit.replacement.pattern or not (named & CHANGES) - said else FOREIGN_PENALTY


def absent(part: Part, text: str, recipe: Recipe) -> str:
    """The value that a text surely names and the recipe has not, if any."""
    fits = _fits(part, normalised(text))
    if not fits or fits[0].score < NAMED:
        return ""
    one = fits[0].replacement
    try:
        has = any(changed(recipe, change) == recipe for _, change in one.variants(recipe, text, numbers(text)))
    except UserError:  # a value that is not wholly said, as edges
        return ""
    return "" if has else one.name


def _telling(part: Part) -> frozenset[str]:
    """Concepts that are a replacement's whole name: they tell replacements apart, though the part may bear them too."""
    names = [meaning(name) for row in family(part) for one in row.replacements for name in one.names]
    return frozenset().union(*(name for name in names if len(name) == 1))


def _best(part: Part, text: str) -> float:
    return max((fit.score for fit in _fits(part, text)), default=0.0)


def _listed(part: Part, text: str) -> list[tuple[str, _Fit]]:
    """The pieces of a list with the replacement of each, where every piece that says something has one."""
    text = next((clause for clause in _REASONS.split(text) if concepts(clause)), text)
    pieces = [piece for piece in _BREAK.split(_THEN.sub(" with ", text)) if concepts(piece) or numbers(piece)]
    found: list[tuple[str, _Fit]] = []
    for piece in pieces:
        fits = _fits(part, piece)
        if fits and fits[0].score >= LOOSE.least:
            found.append((piece, fits[0]))
        elif concepts(piece):
            return []
    whole = [pair for pair in found if not any(_within(pair[1], other) for _, other in found)]
    return whole if len({fit.replacement.name for _, fit in whole}) > 1 else []


def _within(fit: _Fit, other: _Fit) -> bool:
    """Whether a replacement says part of what another one says: learned weights, and learned weights a layer."""
    one, more = fit.replacement.change, other.replacement.change
    return not callable(one) and not callable(more) and one != more and one.items() <= more.items()


def _of(fit: _Fit, text: str, recipe: Recipe, *, name: bool = False) -> Iterator[Choice]:
    one, needs = fit.replacement, fit.part.needs(recipe)
    also = _count_beside(fit.part, text, recipe)
    variants = one.variants(recipe, text, numbers(text))
    for variant, change in variants:
        label = variant or (one.name if name else "")
        note = one.note if len(variants) > 1 or not one.several else ""
        yield Choice({**also, **change}, fit.score, label, note, needs)


def _joined(fits: Sequence[_Fit], recipe: Recipe, text: str) -> Change:
    """What a text names besides its best replacement, of a part that goes with it: `TIES with uniform weights`."""
    best = fits[0]
    others = (fit for fit in fits[1:] if fit.part.name in best.part.joins and fit.score >= LOOSE.least)
    return next((fit.replacement.variants(recipe, text, ())[0][1] for fit in others), {})


def _count_beside(part: Part, text: str, recipe: Recipe) -> Change:
    """A number that a replacement's text gives for something else of its field: `uniform, N = 8`."""
    for row in family(part):
        found = [
            n
            for n in numbers(text)
            if row.numeric and (n.symbol in row.numeric.symbols or n.after in row.numeric.units)
        ]
        if row.numeric and len(found) == 1 and row.path == "decouple.num_ranges":
            return row.numeric.change(recipe, found[0])
    return {}


def _numeric(part: Part, text: str, recipe: Recipe, each: bool) -> Iterator[Choice]:
    """An arm for each number that belongs to the part, or to a related one that is named by symbol or unit."""
    for row in family(part):
        found = [replace(number, each=each) for number in _own_numbers(row, text, strict=row is not part)]
        if not found or row.numeric is None:
            continue
        given = next((one for one in row.replacements if one.name == "given weights"), None)
        if given is not None:
            changes = [(variant, change) for variant, change in given.variants(recipe, text, found)]
        else:
            changes = [
                (str(number) if len(found) > 1 else "", row.numeric.change(recipe, number)) for number in _once(found)
            ]
        for variant, change in changes:
            yield Choice(change, 1.0 if row is part else SURE, variant, "", row.needs(recipe))
        return


def _own_numbers(part: Part, text: str, *, strict: bool) -> list[Number]:
    if part.numeric is None or _VARYING.search(text):
        return []  # a value that changes is not one
    symbols, units = part.numeric.symbols, part.numeric.units
    every = numbers(text)
    symbol = [n for n in every if n.symbol in symbols]
    unit = [n for n in every if n.after in units]
    if strict and not symbol and not unit:
        return []
    if symbol:
        every = every[every.index(symbol[0]) :]
    if not symbol and frozenset(concepts(text)) & _QUANTITIES - part.field:
        every = tuple(n for n in every if n.after in units and n.after not in _DOING)
    others = _SYMBOLS - {*symbols}
    return [n for n in every if n.symbol not in others and (n.kind == "factor" or n.after in (*units, *_JOINING))]


def _by_symbol(part: Part, text: str) -> bool:
    """Whether a text begins with the part's own symbol and a value, as `p = 0.5`."""
    every = numbers(text)
    return bool(part.numeric and every and every[0].symbol in part.numeric.symbols and _ASSIGNED.match(text))


def _once(found: Sequence[Number]) -> list[Number]:
    return list({(number.value, number.kind): number for number in found}.values())


def _unknown(part: Part, text: str, wording: str) -> Meant:
    foreign = ranked({row.name: score(wording, row.names) for row in FOREIGN})
    near = tuple(dict.fromkeys(fit.replacement.name for fit in _fits(part, wording)))[:3]
    if foreign and foreign[0][1] >= LOOSE.least:
        row = next(row for row in FOREIGN if row.name == foreign[0][0])
        return Meant(reason=f"{row.name}: {row.reason}", nearest=near or takes(part), score=_best(part, wording))
    reason = f"{part.name} takes nothing that is surely meant by {text!r}; it takes {'; '.join(takes(part))}"
    return Meant(reason=reason, nearest=near or takes(part), score=_best(part, wording))
