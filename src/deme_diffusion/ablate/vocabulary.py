"""The words of plans and what they stand for: a concept has many names, so that synonyms need not list each.

Names are told by their stems (`text.stem`); one of several words is read before those of fewer.
"""

from __future__ import annotations

from functools import cache

from deme_diffusion.ablate.text import normalised, words
from deme_diffusion.ablate.vocabulary_foreign import FOREIGN, NEUTRAL
from deme_diffusion.ablate.vocabulary_merging import MERGING
from deme_diffusion.ablate.vocabulary_training import TRAINING

CONCEPTS: dict[str, str] = {**MERGING, **TRAINING}
"""Concept -> its names: what the parts table speaks of."""


@cache
def phrases() -> dict[tuple[str, ...], str]:
    """Stems of each name -> its concept, `` for neutral words; the first of two concepts with one name keeps it."""
    found: dict[tuple[str, ...], str] = {}
    for concept, names in {**CONCEPTS, **FOREIGN, "": NEUTRAL}.items():
        for name in names.split(", "):
            found.setdefault(tuple(words(normalised(name))), concept)
    found.pop((), None)
    return found


@cache
def longest() -> int:
    """Words of the longest name."""
    return max(map(len, phrases()))
