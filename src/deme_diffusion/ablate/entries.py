"""An entry of a plan, in whatever form it was written, to an Ablation: field names, actions, lists."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from deme_diffusion.ablate.cleaning import CONTROL, clean, one_line
from deme_diffusion.ablate.listing import is_none, split_items
from deme_diffusion.ablate.plan import ACTIONS, Ablation, Action, Plan, Problem
from deme_diffusion.errors import nearest

FIELDS: Mapping[str, tuple[str, ...]] = {
    "name": ("name", "title", "ablation", "ablation name", "ablation title", "experiment", "experiment name"),
    "ablated_part": (
        *("ablated part", "ablated parts", "ablated component", "ablated components", "ablated module", "ablated"),
        *("part", "component", "module", "target", "ablation target", "part ablated", "component ablated"),
        *("part to ablate", "component to ablate", "what is ablated", "what to ablate", "ablated element"),
    ),
    "action": (
        "action",
        "actions",
        "ablation action",
        "action type",
        "operation",
        "ablation type",
        "ablation operation",
    ),
    "replacement": (
        *("replacement", "replacements", "replacement s", "replacement options", "replacement values"),
        *("replace with", "replaced with", "replace by", "replaced by", "alternative", "alternatives", "options"),
        *("variants", "substitute", "substitutes", "addition", "additions"),
    ),
    "metrics": (
        *("metrics", "metric", "metric s", "evaluation metrics", "evaluation metric", "evaluation", "key metrics"),
        *("measures", "measured by", "evaluated by", "metrics to report", "measurements"),
    ),
    "set": ("set",),
    "sets": ("sets",),
}
"""What authors call the fields of an entry. `set` and `sets`: the exact change, for all replacements and for each."""
FIELD_OF = {synonym: field for field, synonyms in FIELDS.items() for synonym in synonyms}

VERBS: Mapping[Action, str] = {
    "REMOVE": "remove removes removed removing removal drop drops dropped dropping disable disables disabled disabling "
    "delete deletes deleted deleting deletion eliminate eliminates eliminated eliminating elimination ablate exclude "
    "excluded omit omitted",
    "REPLACE": "replace replaces replaced replacing replacement replacements swap swaps swapped swapping substitute "
    "substitutes substituted substituting substitution change changes changed changing vary varies varied varying "
    "modify modified",
    "ADD": "add adds added adding addition insert inserts inserted inserting insertion introduce introduces introduced "
    "introducing introduction include included",
}
ACTION_OF: Mapping[str, Action] = {form: action for action, forms in VERBS.items() for form in forms.split()}
WITH = re.compile(r"^\W*[a-z]+\s+(?:it\s+|them\s+)?(?:with|by)\b[\s:]+(?=\S)", re.IGNORECASE)
DEEPEST = 8
"""Nesting of lists and mappings inside an entry that somebody may have meant."""

NAME_KEYS = ("name", "replacement", "text", "title", "option", "value", "method", "to", "new", "with", "by", "type")
OLD_KEYS = ("from", "original", "current", "baseline", "old", "description", "rationale", "reason")
COUNTED = re.compile(r"(?:[a-z]|(?:option|arm|variant|replacement|alternative|choice)s?)?[ _]?\d*", re.IGNORECASE)


class UnreadableError(ValueError):
    """An entry, or one of its fields, that cannot be read."""


def key_of(text: str) -> str:
    """A field's name without case, underscores, hyphens and brackets."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def field_of(text: str) -> str | None:
    """The field that a name means, None for a name that is no field's."""
    return FIELD_OF.get(key_of(text))


def action_of(text: str) -> Action:
    """REMOVE, REPLACE or ADD, in any case, verb form, and with words around. Raises UnreadableError for others."""
    words = re.findall(r"[^\W\d_]+", text[:200].casefold())
    meant = [ACTION_OF[word] for word in words if word in ACTION_OF]
    filler = [word for word in words if word not in ACTION_OF and word not in ("or", "and")]
    alone = words and words[0] in ACTION_OF and filler
    if meant and (alone or len(set(meant)) == 1):
        return meant[0]
    if meant:
        raise UnreadableError(f"action {shown(text)} names several of {', '.join(ACTIONS)}: one entry for each")
    near = get_close_matches(words[0], list(ACTION_OF), n=1) if words else []
    meant_so = f"; did you mean {ACTION_OF[near[0]]!r}?" if near else ""
    raise UnreadableError(f"action {shown(text)} is none of {', '.join(ACTIONS)}{meant_so}")


def shown(value: Any) -> str:
    """A short repr for messages."""
    text = repr(value) if isinstance(value, str | int | float) else f"a {_kind(value)}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    return "mapping" if isinstance(value, Mapping) else type(value).__name__


def ablation_of(fields: Mapping[str, Any], line: int, report: Callable[[Problem], None]) -> Ablation:
    """The Ablation of an entry's fields (values as JSON knows them). Raises UnreadableError with the reason.

    A replacement whose exact change cannot be read is reported and left out, where others are left.
    """
    name, part = text_in(fields, "name"), text_in(fields, "ablated_part")
    if not name and not part:
        raise UnreadableError("an entry with neither a name nor an ablated part")
    said = text_in(fields, "action")
    if not said:
        raise UnreadableError(f"{shown(name or part)} has no action ({', '.join(ACTIONS)})")
    problems: list[Problem] = []
    texts, changes = replacements_of(fields.get("replacement"), line, problems.append)
    after = WITH.match(said)
    if not texts and after and action_of(said) == "REPLACE":
        texts = split_items(said[after.end() :])
    for text, change in mapping_in(fields, "sets").items():
        try:
            changes[one_line(text)] = flat(change)
        except UnreadableError as error:
            problems.append(Problem(line, f"{shown(one_line(text))}: {error}"))
            texts = [other for other in texts if other != one_line(text)]
    if problems and not texts:
        raise UnreadableError(problems[0].what)
    for problem in problems:
        report(problem)
    return Ablation(
        name=name or part,
        ablated_part=part or name,
        action=action_of(said),
        replacement=texts,
        metrics=[text for text in texts_of(fields.get("metrics"), metrics=True) if text],
        change=flat(mapping_in(fields, "set")),
        changes=changes,
        line=line,
    )


def text_in(fields: Mapping[str, Any], key: str) -> str:
    """A field that is one text; numbers are taken as written, a list of one as its entry."""
    value = fields.get(key)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return one_line(", ".join(value))
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else one_line(str(value))
    raise UnreadableError(f"{key} is a {_kind(value)}, not a text")


def mapping_in(fields: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A field that is a mapping."""
    value = fields.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UnreadableError(f"{key} is {shown(value)}, not a mapping of settings to values")
    return value


def replacements_of(
    value: Any, line: int, report: Callable[[Problem], None]
) -> tuple[list[str], dict[str, Mapping[str, Any]]]:
    """The replacements, and the exact changes of those that are mappings with `set`, each by a name of its own."""
    changes: dict[str, Mapping[str, Any]] = {}
    entries = value if isinstance(value, list) else [value]
    texts: list[str] = []
    for entry in entries:
        if not (isinstance(entry, Mapping) and "set" in entry):
            texts += texts_of([entry] if isinstance(value, list) else entry)
            continue
        try:
            change = flat(mapping_in(entry, "set"))
            text = text_in(entry, "name") or ", ".join(f"{path}={setting}" for path, setting in change.items())
        except UnreadableError as error:
            name = f"{shown(entry['name'])}: " if entry.get("name") else ""
            report(Problem(getattr(entry, "line", line), f"{name}{error}; this replacement is left out"))
            continue
        text = _unlike(text, texts)
        texts.append(text)
        changes[text] = change
    return texts, changes


def _unlike(text: str, taken: Sequence[str]) -> str:
    """The text, numbered where another replacement is called so."""
    names = (text if number == 1 else f"{text} ({number})" for number in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


def texts_of(value: Any, *, metrics: bool = False, depth: int = 0) -> list[str]:
    """A list of texts out of a list, a mapping, or one text that lists several."""
    if depth > DEEPEST:
        raise UnreadableError("lists and mappings nested too deeply")
    if value is None:
        return []
    if isinstance(value, str):
        return [] if is_none(value) else split_items(one_line(value), metrics=metrics)
    if isinstance(value, Mapping):
        return _of_mapping(value, depth)
    if isinstance(value, list):
        return [text for entry in value for text in _of_entry(entry, metrics, depth)]
    return [str(value)]


def _of_entry(entry: Any, metrics: bool, depth: int) -> list[str]:
    """An entry of a list: its text is not split again."""
    if isinstance(entry, str):
        return [one_line(entry)] if one_line(entry) else []
    return texts_of(entry, metrics=metrics, depth=depth + 1)


def _of_mapping(value: Mapping[str, Any], depth: int) -> list[str]:
    """A mapping is one named entry, a numbered list, or a list of `name: what`."""
    named = [key for key in NAME_KEYS if isinstance(value.get(key), str)]
    if named and all(key in (*NAME_KEYS, *OLD_KEYS) for key in value):
        return _of_entry(value[named[0]], False, depth)
    texts: list[str] = []
    for key, entry in value.items():
        if key in OLD_KEYS:
            continue
        inner = _of_entry(entry, False, depth) if not isinstance(entry, bool) else []
        numbers = isinstance(entry, list) and all(isinstance(each, int | float) for each in entry)
        counted = COUNTED.fullmatch(key) and not isinstance(entry, int | float)
        if (counted or (isinstance(entry, list) and entry)) and not numbers:
            texts += inner
        else:
            texts += [f"{one_line(key)}: {text}" for text in inner] or [one_line(key)]
    return [text for text in texts if text]


def flat(values: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Config path -> value, of nested mappings. Raises UnreadableError for what is no path."""
    if depth > DEEPEST or not isinstance(values, Mapping):
        raise UnreadableError("set is nested too deeply" if depth else "set is not a mapping of settings to values")
    paths: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{one_line(str(key))}"
        if isinstance(value, Mapping) and value:
            paths |= flat(value, f"{path}.", depth + 1)
        else:
            paths[path] = _plain(value)
    return paths


def _plain(value: Any) -> Any:
    """A setting's value, its texts without control characters."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return CONTROL.sub(" ", value) if isinstance(value, str) else value


def known_fields(
    entry: Mapping[str, Any], line: int, report: Callable[[Problem], None], *, all_keys: bool
) -> dict[str, Any]:
    """The fields of a mapping; a key that is no field's is a problem if it is near one's, or with `all_keys` always."""
    fields: dict[str, Any] = {}
    for key, value in entry.items():
        field = field_of(str(key))
        near = nearest(key_of(str(key)).replace(" ", "_"), list(FIELDS)[:6])
        if field:
            fields.setdefault(field, value)
        elif near or all_keys:
            report(Problem(line, f"{shown(str(key))} is no field of an ablation{near}"))
    return fields


def normalised(plan: Plan) -> Plan:
    """The plan as any of the written forms gives it back: texts in one line, no control characters, no empty ones."""
    return Plan(clean(plan.discussion).strip(), [_normalised(each) for each in plan.ablations], list(plan.problems))


def _normalised(ablation: Ablation) -> Ablation:
    name, part = one_line(ablation.name), one_line(ablation.ablated_part)
    return Ablation(
        name=name or part,
        ablated_part=part or name,
        action=ablation.action,
        replacement=_lines(ablation.replacement),
        metrics=_lines(ablation.metrics),
        change=flat(ablation.change),
        changes={one_line(text): flat(change) for text, change in ablation.changes.items()},
        line=ablation.line,
    )


def _lines(texts: Iterable[str]) -> list[str]:
    return [line for line in map(one_line, texts) if line]
