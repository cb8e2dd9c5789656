"""Free text against the names of a table's rows: concepts found, a score in [0, 1], the best row and the next ones.

A text is cut into clauses; those after the first that says more than what is common to all parts (`GENERIC`) count
`LATER`. Its words become concepts (`vocabulary`), each with a
weight: `known`, `unknown` for a word of no vocabulary, 0 for words that say nothing (the, method, ablation).
A name fits a text that holds all of its concepts. Its score is

    position x (floor + (1 - floor) E / (E + U))

with `position` the mean weight of the places in which its concepts stand, E the weight, 1 each, of those that the name
explains (times `short` for a name of one concept) and U that of the rest, where words of the row's own field count
`OWN`, unknown words the less the more concepts the name has (`FAMILIAR`), and all later clauses together at most
`MOST`, since reasons may be long. A row scores as its best name does.
Which part a text speaks of is judged by `STRICT`, where what stands behind a preposition counts `BEHIND`; which
replacement of a known part, by `LOOSE`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from deme_diffusion.ablate.text import normalised, stem, words
from deme_diffusion.ablate.vocabulary import longest, phrases
from deme_diffusion.ablate.vocabulary_foreign import FOREIGN

LATER, BEHIND, OWN, MOST, FAMILIAR = 0.4, 0.8, 0.2, 0.6, 0.5
GENERIC = frozenset(["loss", "training", "finetuning", "expert", "weight", "nsymbol", "samplingt", "number", "search"])
"""Concepts of many parts: a clause of these alone leaves it to the next one to say which is meant."""
MARGIN = 0.08
"""A best score within it of the next is ambiguous."""
_BRACKETS = re.compile(r"\(([^()]*)\)")
_PURPOSES = (
    "handle resolve reduce improve keep see test assess evaluate ensure prevent preserve avoid maintain obtain make "
    "learn determine understand measure allow help capture encourage stay be quantify isolate verify check examine "
    "balance mitigate better match align explore study show find enable provide address investigate"
)
_CLAUSES = re.compile(
    r"\s-{1,3}\s|[:;()\[\]?!]|\.\s|, (?=which|where|so |in order|since|because)"
    r"|\b(?:once the|until the)\b"
    r"|\b(?:that|(?<!in )which|where|because|since|in order to|so that|so as to|thereby|suchas|thatis|whereby|aimed"
    r"|designed|instead of|in place of|rather than|as opposed to|compared"
    rf"|versus|unlike|to (?:{'|'.join(_PURPOSES.split())}))\b"
)
_BEFORE = "between|of|for|from|in|across|using|with|by|via|on|during|within|over|into|to|after|before|at|under"
PREPOSITIONS = frozenset(map(stem, _BEFORE.split("|")))


@dataclass(frozen=True)
class Judgement:
    """How a text is scored; a score below `least` is no match."""

    known: float
    unknown: float
    floor: float
    short: float
    least: float


STRICT = Judgement(known=1.0, unknown=0.6, floor=0.25, short=0.7, least=0.6)
LOOSE = Judgement(known=1.5, unknown=0.3, floor=0.4, short=1.0, least=0.56)


@dataclass(frozen=True)
class Tag:
    """A concept found in a text (`?word` for an unknown word), the weight of its place, and if a later clause's."""

    concept: str
    place: float
    later: bool = False


@lru_cache(maxsize=4096)
def tagged(text: str, *, head: bool = False, common: frozenset[str] = frozenset()) -> tuple[Tag, ...]:
    """The concepts of a text in order, neutral words left out; `head`: what stands behind a preposition counts less.

    `common` are concepts that do not make the clauses after them later ones, as GENERIC. What stands in round brackets
    comes after the rest.
    """
    found: list[Tag] = []
    text, clauses = normalised(text), list[str]()
    for clause in (*_CLAUSES.split(_BRACKETS.sub(" , ", text)), *_BRACKETS.findall(text)):
        clauses += _CLAUSES.split(clause)
    for clause in clauses:
        later = any(tag.concept not in GENERIC and tag.concept not in common for tag in found)
        place = LATER if later else 1.0
        for piece in re.split(r"[,;/|&+]", clause):
            found += [Tag(name, place * (BEHIND if head and behind else 1.0), later) for name, behind in _read(piece)]
    return tuple(found)


def concepts(clause: str) -> tuple[str, ...]:
    """The concepts of normalised text, of several that begin at a word the longest."""
    return tuple(concept for concept, _ in _read(clause))


@lru_cache(maxsize=16384)
def _read(clause: str) -> tuple[tuple[str, bool], ...]:
    """Concepts, and whether each stands behind a preposition that follows another."""
    stems, names, found, position = words(clause), phrases(), list[tuple[str, bool]](), 0
    behind = False
    while position < len(stems):
        for length in range(min(longest(), len(stems) - position), 0, -1):
            concept = names.get(tuple(stems[position : position + length]))
            if concept is not None:
                break
        else:
            length, concept = 1, f"?{stems[position]}"
        behind = behind or (bool(found) and length == 1 and stems[position] in PREPOSITIONS)
        found += [(concept, behind)] if concept else []
        position += length
    return tuple(found)


@lru_cache(maxsize=4096)
def meaning(name: str) -> frozenset[str]:
    """The concepts of a synonym."""
    return frozenset(concepts(normalised(name)))


def score(text: str, names: Iterable[str], own: frozenset[str] = frozenset(), judgement: Judgement = LOOSE) -> float:
    """How well the best of some names fits the text, in [0, 1]; `own`: concepts of the field, that say little."""
    return max((value for value, _ in fits(text, map(meaning, names), own, judgement)), default=0.0)


def fits(
    text: str, meanings: Iterable[frozenset[str]], own: frozenset[str], judgement: Judgement
) -> Iterator[tuple[float, frozenset[str]]]:
    """Names, as their concepts, that the text holds, with their scores."""
    tags, places = _placed(text, judgement is STRICT, frozenset() if judgement is STRICT else own)
    for wanted in meanings:
        if wanted and wanted <= places.keys():
            yield _fit(wanted, tags, places, own, judgement), wanted


@lru_cache(maxsize=4096)
def _placed(text: str, head: bool, common: frozenset[str]) -> tuple[tuple[Tag, ...], Mapping[str, float]]:
    """A text's tags, each once, and the best place of each concept."""
    tags = tagged(text, head=head, common=common)
    places: dict[str, float] = {}
    for tag in tags:
        places[tag.concept] = max(tag.place, places.get(tag.concept, 0.0))
    return tuple(dict.fromkeys(tags)), places


def strangeness(text: str) -> float:
    """The share of a text's first clause that is of no vocabulary, or of other methods', in [0, 1]."""
    first = [tag for tag in tagged(text) if not tag.later]
    return sum(tag.concept.startswith("?") or tag.concept in FOREIGN for tag in first) / len(first) if first else 0.0


def _fit(
    wanted: frozenset[str],
    tags: tuple[Tag, ...],
    places: Mapping[str, float],
    own: frozenset[str],
    judgement: Judgement,
) -> float:
    known = sum(places[concept] for concept in wanted)
    explained = known * (judgement.short if len(wanted) == 1 else 1.0)
    unknown = judgement.unknown / (1 + FAMILIAR * (len(wanted) - 1))
    left = [tag for tag in tags if tag.concept not in wanted]
    rest = sum(_weight(tag, own, judgement.known, unknown) for tag in left if not tag.later)
    rest += min(MOST, sum(_weight(tag, own, judgement.known, unknown) for tag in left if tag.later))
    return known / len(wanted) * (judgement.floor + (1 - judgement.floor) * explained / (explained + rest))


def _weight(tag: Tag, own: frozenset[str], known: float, unknown: float) -> float:
    if tag.concept in own:
        return tag.place * OWN
    return tag.place * (unknown if tag.concept.startswith("?") else known)


def ranked(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Rows that fit at all, the best first; equal ones in the table's order."""
    return sorted(((name, value) for name, value in scores.items() if value > 0), key=lambda pair: -pair[1])
