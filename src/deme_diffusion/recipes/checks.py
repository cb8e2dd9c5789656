"""Plain values to a checked `Recipe`: the first problem in one line, with the nearest valid name. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError, nearest


def parse(values: Mapping[str, Any], *, where: str) -> Recipe:
    """A checked recipe from plain values. Raises UserError: one line with file, key, and the nearest valid value."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # An unknown key is more often the cause than what its absence breaks, so it is told first.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    *parents, key = problem["loc"] or ("",)
    place = ".".join(str(part) for part in problem["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(str(key), keys_of(parents))}{more}"
    if problem["type"] == "literal_error":
        choices = [c.strip("' ") for c in problem["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return (
            f"{place}: {problem['input']!r} is not one of {', '.join(choices)}{nearest(str(problem['input']), choices)}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "value_error" else f" (given: {problem['input']!r})"
    return f"{place}: {message}{given}{more}".removeprefix(": ")


def keys_of(parents: Iterable[str | int]) -> list[str]:
    """The valid keys of a section, named by its path; a list index steps into the list's elements."""
    section: Any = Recipe
    for part in parents:
        if isinstance(part, str) and part in getattr(section, "model_fields", {}):
            section = _section_type(section.model_fields[part].annotation)
    return list(getattr(section, "model_fields", {}))


def _section_type(annotation: Any) -> Any:
    inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
    return inner[0] if inner else annotation
