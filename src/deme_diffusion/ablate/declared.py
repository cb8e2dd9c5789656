"""What the parts table declares, as changes to a recipe: every row, every action that it takes, every replacement."""

from __future__ import annotations

from collections.abc import Iterator

from deme_diffusion.ablate import replacing
from deme_diffusion.ablate.consequences import completed
from deme_diffusion.ablate.parts import PARTS
from deme_diffusion.ablate.plan import Action
from deme_diffusion.ablate.rows import Change, Part
from deme_diffusion.ablate.text import normalised, numbers
from deme_diffusion.config import Recipe
from deme_diffusion.merging.table import METHODS


def declared(recipe: Recipe) -> Iterator[tuple[Part, Action, Change]]:
    """Each part that the recipe does not lack what is needed for, its actions and the changes that they may mean.

    A method of a fixed number of experts comes with that number.
    """
    for part in PARTS.values():
        if part.needs(recipe):
            continue
        if "REMOVE" in part.actions:
            yield part, "REMOVE", completed(recipe, part.off)
        if "ADD" in part.actions:
            yield part, "ADD", completed(recipe, part.on)
        if "REPLACE" in part.actions:
            for change in _replacements(part, recipe):
                yield part, "REPLACE", completed(recipe, change)


def _replacements(part: Part, recipe: Recipe) -> Iterator[Change]:
    for row in part.replacements:
        text = normalised(row.example or row.name)
        for _, change in row.variants(recipe, text, numbers(text)):
            yield {**_experts(change), **change}
    if part.numeric is not None:
        for choice in replacing.meant(part, part.numeric.example, recipe).choices:
            yield choice.change


def _experts(change: Change) -> Change:
    row = METHODS.get(str(change.get("merge.method")))
    return {"decouple.num_ranges": row.experts} if row is not None and row.experts else {}
