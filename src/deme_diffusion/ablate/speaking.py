"""Which part of the method an ablation speaks of, with a score, or why that cannot be said. No torch.

Each row of the parts table, of the plain settings, and of what is known not to be a part, is scored on the ablated part
(P), the ablation's name (N), and its replacements (R). The score is the mean of the three, with the weights

    P: PART max(sure, strange)    N: (NAME + VAGUE_NAME (1 - sure)) n    R: (REPLACEMENTS + VAGUE_REPLACEMENTS vague) r

where `sure`, n and r are the best scores that any row has in P, N and R, `strange` is the share of the ablated part's
words that are of no vocabulary or of other methods', and vague = (1 - sure) (1 - strange): where the ablated part says
nothing, its name and its replacements decide; where it speaks of something else, they do not. R counts nothing where a
row of what is no part fits P best (within `MARGIN`); all counts `ALONE` where no row fits P. R is the mean over the
replacements of how well each fits a value (or name) of the row, times how telling that value is: 1 if one of its
concepts is of this field alone (TIES, DDIM), `COMBINED` if only all of them together are (random boundaries), `COMMON`
if other fields have it as well (uniform); `SYMBOL` for a number with a symbol of the row's own (p = 0.5).
A best score below `STRICT.least`, or within `MARGIN` of an unrelated row's, decides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from deme_diffusion.ablate.foreign import FOREIGN
from deme_diffusion.ablate.matching import (
    LOOSE,
    MARGIN,
    PREPOSITIONS,
    STRICT,
    concepts,
    fits,
    meaning,
    ranked,
    strangeness,
)
from deme_diffusion.ablate.parts import PARTS, ROWS, family
from deme_diffusion.ablate.plan import Ablation
from deme_diffusion.ablate.rows import Foreign, Part
from deme_diffusion.ablate.saying_experts import ONE_OF_SEVERAL, one_of_several
from deme_diffusion.ablate.text import normalised, numbers, words
from deme_diffusion.ablate.vocabulary_foreign import FOREIGN as FOREIGN_WORDS

PART, NAME, REPLACEMENTS = 0.75, 0.15, 0.1
VAGUE_NAME, VAGUE_REPLACEMENTS = 0.35, 0.5
ALONE = 0.85
"""What counts of a score where the ablated part's own text fits no row."""
COMBINED, COMMON, SYMBOL = 0.85, 0.3, 0.9
_LISTED = 0.9
_ROWS: dict[str, Part | Foreign] = {**ROWS, **{row.name: row for row in FOREIGN}}
_CORE = frozenset(["merge", "consistency", "projection", "ema"])
"""Concepts that are a part by themselves: in a text for another part they are no word of its field."""
_TELLING = (*PARTS, *(row.name for row in FOREIGN))
"""Rows whose values make a value of another row less telling; plain settings are too few words for that."""
_EXPLAINED = re.compile(r"\((?!\s*(?:and|plus|with|\+|&))[^()]*\)?")
_GENERAL = re.compile(
    r"\b(?:techniques|strategies|components|tricks|methods|modules|ingredients|contributions|parts)\b"
)
_ALL = re.compile(r"\b(?:all|three|3)\b")
_TECHNIQUES = ("probabilistic sampling", "consistency loss", "channel-wise projection", "all three techniques")
_AND = re.compile(r",|;|/|\+|&|\(|\)|:|\band\b|\bas well as\b|\bplus\b")


@dataclass(frozen=True)
class Spoken:
    """The part, or none and the reason; `several` where a text lists several parts; `nearest` the best others."""

    part: Part | None = None
    score: float = 0.0
    reason: str = ""
    nearest: tuple[str, ...] = ()
    several: tuple[Part, ...] = ()


_WHICH = Spoken(None, 0.0, f"it could be any of: {', '.join(_TECHNIQUES)}; name one", _TECHNIQUES)


def spoken(ablation: Ablation) -> Spoken:
    """The part that an ablation speaks of."""
    if (named := _by_path(ablation.ablated_part)) is not None:
        return Spoken(named, 1.0)
    if one_of_several(ablation.ablated_part):
        return Spoken(None, 0.0, ONE_OF_SEVERAL, ("decoupling", "merge weights"))
    if _general(ablation.ablated_part):
        return _WHICH
    if stranger := _stranger(ablation.ablated_part):
        return Spoken(None, 0.0, f"it names {stranger!r} as well, which is no part of this method; name the part alone")
    several = listed(ablation.ablated_part)
    if len(several) > 1:
        return Spoken(several[0], _LISTED, several=several)
    order = ranked(_scores(ablation))
    if not order or order[0][1] < STRICT.least - 1e-9:
        return _unknown(ablation, order)
    (best, value), *others = order
    row, near = _ROWS[best], tuple(name for name, _ in others if name in ROWS)[:3]
    if isinstance(row, Foreign):
        return Spoken(None, value, f"{row.name}: {row.reason}", row.nearest)
    if best == _TECHNIQUES[-1] and not _ALL.search(normalised(ablation.ablated_part)):
        return _WHICH
    rivals = [name for name, other in others if value - other < MARGIN]
    if strangers := [name for name in rivals if not _related(row, name)]:
        either = ", ".join([best, *strangers][:3])
        return Spoken(None, value, f"it could be any of: {either}; name one", (best, *strangers))
    return Spoken(_chosen(ablation, [best, *rivals]), value, "", near)


def _by_path(text: str) -> Part | None:
    """The part whose setting a text is the name of."""
    path = text.strip().strip("`").casefold()
    return next((part for part in ROWS.values() if path in (part.path, part.path.partition(".")[2])), None)


def _stranger(text: str) -> str:
    """What a plain list names beside a part ("consistency loss and dropout") that is of other methods, if anything."""
    pieces = [piece.strip() for piece in _AND.split(_said(normalised(text))) if concepts(piece)]
    if len(pieces) < 2 or any(PREPOSITIONS & set(words(piece)) for piece in pieces):
        return ""
    strange = [piece for piece in pieces if set(concepts(piece)) <= FOREIGN_WORDS.keys()]
    return strange[0] if 0 < len(strange) < len(pieces) else ""


def _general(text: str) -> bool:
    """Whether a text is a word for several parts, and says neither which nor that all are meant."""
    text = normalised(text)
    return (
        bool(_GENERAL.search(text))
        and not _ALL.search(text)
        and set(concepts(text)) <= {"training", "finetuning", "techniques"}
    )


def _said(text: str) -> str:
    """A normalised list without what only explains it: what stands behind `i.e.`, and in brackets that add nothing."""
    main = _EXPLAINED.sub(" ", text).partition("thatis")[0]
    return main if concepts(main) else text


def listed(text: str) -> tuple[Part, ...]:
    """The parts that a text lists ("probabilistic sampling and consistency loss"), where it lists nothing else."""
    found: list[Part] = []
    for piece in _AND.split(_said(normalised(text))):
        if not concepts(piece):
            continue
        order = ranked(
            {
                name: max((value for value, _ in fits(piece, row.names, frozenset(), STRICT)), default=0.0)
                for name, row in _known().items()
            }
        )
        if not order or order[0][1] < _LISTED or not isinstance(row := _ROWS[order[0][0]], Part):
            continue
        found += [row] if row not in found else []
    related = any(_related(a, b.name) for a in found for b in found if a is not b)
    found = [row for row in found if row.name != "all three techniques"] if len(found) > 2 else found
    return () if related else tuple(found)


@dataclass(frozen=True)
class _Known:
    """What a row is recognised by, as concepts: names; values with how telling each is; its field; telling symbols."""

    names: tuple[frozenset[str], ...]
    values: Mapping[frozenset[str], float]
    field: frozenset[str]
    symbols: frozenset[str] = frozenset()


@cache
def _known() -> Mapping[str, _Known]:
    values = {name: _meanings(row) for name, row in _ROWS.items()}
    symbols = {name: set(row.numeric.symbols) if row.numeric else set[str]() for name, row in ROWS.items()}
    found: dict[str, _Known] = {}
    for name, row in _ROWS.items():
        names = tuple(dict.fromkeys(map(meaning, row.names)))
        if isinstance(row, Foreign):
            found[name] = _Known(names, dict.fromkeys(names, 1.0), frozenset())
            continue
        others = [values[other] for other in _TELLING if other != name and not _related(row, other)]
        elsewhere = frozenset[str]().union(*(one for other in others for one in other))
        sets = {one for other in others for one in other}
        telling = {
            one: COMMON
            if one <= elsewhere and (one in sets or len(one) == 1)
            else COMBINED
            if one <= elsewhere
            else 1.0
            for one in values[name]
        }
        field = frozenset[str]().union(*(one for near in family(row) for one in values[near.name]))
        field -= {"merge", "consistency", "projection", "ema"} - {
            concept for one in names if len(one) == 1 for concept in one
        }
        taken = set[str]().union(*(symbols[other] for other in symbols if other != name and not _related(row, other)))
        found[name] = _Known(names, telling, field, frozenset(symbols[name] - taken))
    return found


def _meanings(row: Part | Foreign) -> tuple[frozenset[str], ...]:
    """Its names and those of its values; numbers have none."""
    values = row.replacements if isinstance(row, Part) else ()
    return tuple(dict.fromkeys(map(meaning, (*row.names, *(name for one in values for name in one.names)))))


def _scores(ablation: Ablation) -> dict[str, float]:
    part, name, values = _table(ablation.ablated_part), _table(ablation.name), _values(ablation.replacement)
    sure, strange = max(part.values()), strangeness(ablation.ablated_part)
    alien = max(part[row.name] for row in FOREIGN)
    telling = (
        REPLACEMENTS + VAGUE_REPLACEMENTS * (1 - sure) * (1 - strange) if alien < sure - MARGIN or not alien else 0
    )
    weighed = [
        (PART * max(sure, strange), part),
        ((NAME + VAGUE_NAME * (1 - sure)) * max(name.values()), name),
        (telling * max(values.values()), values),
    ]
    total = sum(weight for weight, _ in weighed) or 1.0
    factor = 1.0 if sure else ALONE
    return {row: factor * sum(weight * table[row] for weight, table in weighed) / total for row in _ROWS}


def _table(text: str) -> dict[str, float]:
    """Each row's score on a text that names a part."""
    return {
        name: max((value for value, _ in fits(text, row.names, row.field, STRICT)), default=0.0)
        for name, row in _known().items()
    }


def _values(texts: Sequence[str]) -> dict[str, float]:
    """Each row's mean score over texts that name values."""
    total = dict.fromkeys(_ROWS, 0.0)
    for text in texts:
        for name, row in _known().items():
            total[name] += _value(text, row)
    return {name: value / max(1, len(texts)) for name, value in total.items()}


def _value(text: str, row: _Known) -> float:
    found = fits(text, row.values, row.field, LOOSE)
    value = max((value * row.values[one] for value, one in found if value >= LOOSE.least), default=0.0)
    if row.symbols and value < SYMBOL and any(n.symbol in row.symbols for n in numbers(normalised(text))):
        return SYMBOL
    return value


def _related(row: Part, name: str) -> bool:
    other = _ROWS[name]
    return isinstance(other, Part) and (name in row.also or row.name in other.also)


def _chosen(ablation: Ablation, names: list[str]) -> Part:
    """Of parts of one field, the first that takes the action, and whose replacements are meant."""
    parts = [ROWS[name] for name in names]
    able = [part for part in parts if ablation.action in part.actions] or parts
    if ablation.action == "REMOVE":
        return able[0]
    known = _known()
    return max(able, key=lambda part: max((_value(text, known[part.name]) for text in ablation.replacement), default=0))


def _unknown(ablation: Ablation, order: list[tuple[str, float]]) -> Spoken:
    near = tuple(name for name, _ in order if name in ROWS)[:3]
    closest = f"; nearest: {', '.join(near)}" if near else ""
    value = order[0][1] if order else 0.0
    if order and isinstance(row := _ROWS[order[0][0]], Foreign):
        return Spoken(None, value, f"{row.name}: {row.reason}", row.nearest)
    return Spoken(None, value, f"no part of this method is surely meant by {ablation.ablated_part!r}{closest}", near)
