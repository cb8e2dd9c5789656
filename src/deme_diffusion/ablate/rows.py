"""What a row of the parts table says: a part of the method, what it may be replaced by, and its names. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deme_diffusion.ablate.matching import meaning
from deme_diffusion.ablate.plan import Action
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe

Change = Mapping[str, Any]
Variant = tuple[str, Change]
"""What tells arms of one text apart, and the change itself."""


@dataclass(frozen=True)
class Replacement:
    """One value that a part takes: its names, and what it sets, which may read the text's numbers.

    `change` is config path -> value, or a function (recipe, text, numbers) -> variants, that gives several arms where
    the text means several, and raises UserError where it lacks what is needed. A text in which `pattern` is found
    means it; `example` is one that any recipe takes, where the name alone is not enough; `several`: its note is of
    several arms.
    """

    name: str
    synonyms: tuple[str, ...]
    change: Change | Callable[[Recipe, str, Sequence[Number]], Sequence[Variant]]
    note: str = ""
    pattern: str = ""
    example: str = ""
    several: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All that it is called."""
        return (self.name, *self.synonyms)

    def variants(self, recipe: Recipe, text: str, numbers: Sequence[Number]) -> Sequence[Variant]:
        """The changes that the text means, an arm each."""
        return self.change(recipe, text, numbers) if callable(self.change) else [("", self.change)]


@dataclass(frozen=True)
class Numeric:
    """How a part takes numbers: what one sets, the symbols (`p`) and units (`experts`) that belong to it.

    `examples` are for people; `example` suits any recipe.
    """

    change: Callable[[Recipe, Number], Change]
    symbols: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    example: str = ""


@dataclass(frozen=True)
class Part:
    """A part of the method: names, main config path, what REMOVE and ADD set, and what may stand in its place.

    `exact`: what REMOVE names is a value, which the recipe must have (overlapping ranges); `also`: parts of the same
    field, whose replacements a plan may name here; `joins`: of those, what one text may name besides (`TIES with
    uniform weights`); `beside`: what ADD makes of a replacement; `needs`: what a recipe lacks for it, if anything;
    `each`: the config path of its values, one a range.
    """

    name: str
    description: str
    path: str
    synonyms: tuple[str, ...]
    actions: tuple[Action, ...] = ("REMOVE", "REPLACE", "ADD")
    off: Change = field(default_factory=dict)
    on: Change = field(default_factory=dict)
    is_on: Callable[[Recipe], bool] = lambda recipe: True
    replacements: tuple[Replacement, ...] = ()
    numeric: Numeric | None = None
    also: tuple[str, ...] = ()
    exact: bool = False
    joins: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    needs: Callable[[Recipe], str] = lambda recipe: ""
    each: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All that it is called."""
        return (self.name, *self.synonyms)

    @property
    def field(self) -> frozenset[str]:
        """Concepts of its own names: they say little about which replacement is meant."""
        return frozenset().union(*map(meaning, self.names))

    @property
    def takes(self) -> tuple[str, ...]:
        """What REPLACE may name, for people."""
        numbers = (f"numbers ({', '.join(self.numeric.examples)})",) if self.numeric else ()
        return (*(row.name for row in self.replacements), *numbers)


@dataclass(frozen=True)
class Foreign:
    """What plans ask for and no setting is: its names, why it cannot be carried out, the parts that come nearest."""

    name: str
    synonyms: tuple[str, ...]
    reason: str
    nearest: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What it is recognised by; its name is for people."""
        return self.synonyms


@dataclass(frozen=True)
class Choice:
    """A change that a text means; `needs` says what the recipe lacks for it."""

    change: Change
    score: float
    variant: str = ""
    note: str = ""
    needs: str = ""


@dataclass(frozen=True)
class Meant:
    """The changes that a text means, or none and the reason."""

    choices: tuple[Choice, ...] = ()
    reason: str = ""
    nearest: tuple[str, ...] = ()
    score: float = 0.0
