"""Our own form, YAML: `discussion`, and `ablations` that may name the exact change. No tags, no aliases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from deme_diffusion.ablate.entries import field_of
from deme_diffusion.ablate.plan import Ablation, Plan, Problem
from deme_diffusion.ablate.records import take_entry
from deme_diffusion.errors import UserError, nearest

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEEPEST = 20
PLAIN = ("null", "bool", "int", "float")
LISTS = ("ablations", "ablation_plan", "predictions")
ENTRY = re.compile(r"( *)- ")
Entries = list[tuple[int, Any]]


class Lined(dict[str, Any]):
    """A mapping that knows its line, counted from 1."""

    line: int


class BrokenError(ValueError):
    """A document, or a part of one, that is no YAML; `line` counts from 1."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def read_yaml(text: str, where: str) -> Plan:
    """The plan in a clean text. Raises UserError for tags and aliases; what else is wrong are its problems."""
    problems: list[Problem] = []
    ablations: list[Ablation] = []
    try:
        discussion, entries = _document(text, where, problems)
    except BrokenError as error:
        discussion, entries = _piecewise(text, where, problems, error)
    for line, entry in entries:
        if isinstance(entry, dict):
            take_entry(entry, line, ablations.append, problems.append, all_keys=True)
        else:
            problems.append(Problem(line, "an entry that is no mapping of fields"))
    return Plan(discussion, ablations, sorted(problems, key=lambda problem: problem.line))


def _document(text: str, where: str, problems: list[Problem]) -> tuple[str, Entries]:
    """The discussion and the entries with their lines. Raises BrokenError for what is no YAML."""
    root = composed(text, where)
    if isinstance(root, yaml.SequenceNode):
        return "", [(_line(node), value_of(node)) for node in root.value]
    if not isinstance(root, yaml.MappingNode):
        return "", []
    discussion, entries, listed = "", Entries(), False
    for key, node in root.value:
        name = str(key.value).strip().lower() if isinstance(key, yaml.ScalarNode) else ""
        if name == "discussion":
            discussion = node.value.strip() if isinstance(node, yaml.ScalarNode) else ""
        elif name in LISTS and isinstance(node, yaml.SequenceNode):
            entries += [(_line(entry), value_of(entry)) for entry in node.value]
        elif name in LISTS and isinstance(node, yaml.MappingNode):  # name: its fields
            entries += [(_line(each), {"name": each.value, **_fields(entry)}) for each, entry in node.value]
        elif _lists_ablations(name, node):
            problems.append(Problem(_line(key), f"{name!r} is no field; did you mean 'ablations'?"))
            listed = True
        elif name not in LISTS and not field_of(name):
            near = nearest(name, ("discussion", "ablations"))
            problems.append(Problem(_line(key), f"{name!r} is no key of a plan (discussion, ablations){near}"))
    if not entries and not listed and any(isinstance(key.value, str) and field_of(key.value) for key, _ in root.value):
        entries = [(_line(root), value_of(root))]
    return discussion, entries


def _lists_ablations(name: str, node: Any) -> bool:
    """Whether a key that reads as the name of one ablation holds several, as `ablation: [...]`."""
    if name in LISTS or field_of(name) != "name" or isinstance(node, yaml.ScalarNode):
        return False
    fields = [key.value for key, _ in node.value if isinstance(key.value, str)] if _is_mapping(node) else []
    return not any(field_of(key) for key in fields)


def _is_mapping(node: Any) -> bool:
    return isinstance(node, yaml.MappingNode)


def _fields(node: Any) -> dict[str, Any]:
    value = value_of(node)
    return value if isinstance(value, dict) else {}


def composed(text: str, where: str) -> Any:
    """The tree of nodes. Raises UserError for tags and aliases, BrokenError for what is no YAML or too deep."""
    try:
        _check(text, where)
        return yaml.compose(text, Loader=LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "characters that YAML does not allow"
        raise BrokenError(mark.line + 1 if mark else 1, f"not YAML: {what}") from None


def _check(text: str, where: str) -> None:
    """Looks at the events before anything is built of them."""
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=LOADER):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UserError(f"{where}, line {line}: YAML anchors and aliases are not read")
        if getattr(event, "tag", None):
            raise UserError(f"{where}, line {line}: YAML tags are not read ({event.tag[:60]})")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise BrokenError(line, "nested too deeply")


def value_of(node: Any, above: int = 0) -> Any:
    """A node's plain value; dates and the like stay as they are written. `above`: lines before its document."""
    if isinstance(node, yaml.MappingNode):
        found = Lined({str(key.value): value_of(value, above) for key, value in node.value})
        found.line = above + _line(node)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [value_of(entry, above) for entry in node.value]
    if node.tag.rsplit(":", 1)[-1] not in PLAIN:
        return node.value
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, yaml.YAMLError):
        return node.value


def _line(node: Any) -> int:
    """Where a node begins, counted from 1."""
    return int(node.start_mark.line) + 1


def _piecewise(text: str, where: str, problems: list[Problem], error: BrokenError) -> tuple[str, Entries]:
    """Each entry on its own, after the whole document could not be read."""
    lines = text.split("\n")
    start = next((at for at, line in enumerate(lines) if re.match(rf"(?:{'|'.join(LISTS)})\s*:\s*$", line)), None)
    if start is None:
        problems.append(Problem(error.line, str(error)))
        return "", []
    discussion = ""
    try:
        discussion, _ = _document("\n".join(lines[:start]), where, problems)
    except BrokenError as broken:
        problems.append(Problem(broken.line, str(broken)))
    entries = Entries()
    for first, piece in _pieces(lines, start + 1):
        try:
            root = composed(piece, where)
        except BrokenError as broken:
            problems.append(Problem(first + broken.line, str(broken)))
            continue
        if isinstance(root, yaml.SequenceNode):
            entries += [(first + _line(entry), value_of(entry, first)) for entry in root.value]
    return discussion, entries


def _pieces(lines: list[str], start: int) -> Iterator[tuple[int, str]]:
    """The texts of the entries, and how many lines stand before each."""
    first = next((found[1] for line in lines[start:] if (found := ENTRY.match(line))), "")
    begins = [at for at in range(start, len(lines)) if lines[at].startswith(f"{first}- ")]
    for at, end in zip(begins, [*begins[1:], len(lines)], strict=True):
        yield at, "\n".join(lines[at:end])
