"""The parts table: every part of the method that a plan can ablate, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from deme_diffusion.ablate import (
    table_conditional,
    table_division,
    table_merging,
    table_optimising,
    table_sampling,
    table_training,
)
from deme_diffusion.ablate.rows import Part
from deme_diffusion.ablate.table_settings import SETTINGS

PARTS: Mapping[str, Part] = {
    part.name: part
    for module in (table_division, table_training, table_optimising, table_merging, table_sampling, table_conditional)
    for part in module.PARTS
}

ROWS: Mapping[str, Part] = {**PARTS, **{part.name: part for part in SETTINGS}}
"""The parts, and after them the plain settings: recognised where a plan names them, and proposed by nobody."""


def family(part: Part) -> list[Part]:
    """The part, then those whose replacements it takes as well."""
    return [part, *(ROWS[name] for name in part.also)]


def listing() -> Iterator[dict[str, str]]:
    """A row a part, for people: part, what it is, its setting, actions, what REMOVE sets, what REPLACE takes, names."""
    for part in PARTS.values():
        off = ", ".join(f"{path}={'null' if value is None else value}" for path, value in part.off.items())
        yield {
            "part": part.name,
            "description": part.description,
            "setting": part.path,
            "actions": ", ".join(part.actions),
            "off": off if "REMOVE" in part.actions else "",
            "takes": "; ".join(part.takes) if "REPLACE" in part.actions else "",
            "synonyms": ", ".join(part.synonyms),
        }
