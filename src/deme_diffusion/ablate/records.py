"""The second form: `<discussion>` and `<predictions>` with one JSON object a line, and bare JSON lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deme_diffusion.ablate.cleaning import unescaped
from deme_diffusion.ablate.entries import UnreadableError, ablation_of, field_of, known_fields
from deme_diffusion.ablate.plan import Ablation, Plan, Problem
from deme_diffusion.ablate.values import NotParsedError, parsed_at

OPENING = re.compile(r"<(discussion|predictions)>", re.IGNORECASE)
CLOSING = {name: re.compile(f"</{name}>", re.IGNORECASE) for name in ("discussion", "predictions")}
WRAPPED = re.compile(r"[\"'](?:ablations|ablation_plan|predictions|plan)[\"']\s{0,20}:\s{0,20}\[", re.IGNORECASE)
SKIPPED = re.compile(r"[\s\[\](){},;]*|\s*(?:`{3,}|~{3,})[ \t]{0,9}\w{0,20}[ \t]{0,9}|\s*</?\w{1,20}>[ \t]{0,9}")
BEFORE = re.compile(r"[\s\[,]{0,99}(?:(?:[-*+•]|\d{1,4}[.):])\s{1,9})?[\s\[,`]{0,9}(?=\{)")
LONGEST = 400
"""Lines of an object written over several."""


def read_records(text: str) -> Plan:
    """The plan in a clean text; a line that is no object is a problem, and the others are read."""
    discussion, region, first = _split(text)
    records = _Records(region.split("\n"), first, bare=OPENING.search(text) is None)
    records.read()
    said = discussion.strip() or "\n".join(records.said).strip()
    return Plan(unescaped(said), records.ablations, records.problems)


def _split(text: str) -> tuple[str, str, int]:
    """The discussion, the predictions, and the number of the predictions' first line."""
    wrapped = _unwrapped(text)
    if wrapped:
        return wrapped
    inside: dict[str, tuple[int, int]] = {}
    openings = list(OPENING.finditer(text))
    for at, opened in enumerate(openings):
        name = opened[1].lower()
        if name in inside:
            continue
        closed = CLOSING[name].search(text, opened.end())
        end = closed.start() if closed else openings[at + 1].start() if at + 1 < len(openings) else len(text)
        inside[name] = (opened.end(), end)
        if name == "predictions":
            break
    if not inside:
        return "", text, 1
    begin, end = inside.get("discussion", (0, 0))
    start, stop = inside.get("predictions", (end, len(text)))
    return text[begin:end], text[start:stop], text.count("\n", 0, start) + 1


def _unwrapped(text: str) -> tuple[str, str, int] | None:
    """The same for a whole plan in one JSON object."""
    bare = text.strip().strip("`").removeprefix("json").strip()
    found = WRAPPED.search(text) if bare.startswith("{") else None
    if found is None:
        return None
    try:
        value, _ = parsed_at(bare)
    except NotParsedError:
        value = {}
    said = value.get("discussion", "") if isinstance(value, dict) else ""
    return said if isinstance(said, str) else "", text[found.end() :], text.count("\n", 0, found.end()) + 1


class _Records:
    """Reads objects out of lines, those that run over several lines too."""

    def __init__(self, lines: Sequence[str], first: int, *, bare: bool) -> None:
        self.lines, self.first, self.bare = lines, first, bare
        self.ablations: list[Ablation] = []
        self.problems: list[Problem] = []
        self.said: list[str] = []

    def read(self) -> None:
        """All lines."""
        at, begun = 0, False
        while at < len(self.lines):
            line = self.lines[at]
            start = BEFORE.match(line)
            if start:
                begun = True
                at = self._object(at, start.end())
                continue
            if not SKIPPED.fullmatch(line):
                self._prose(at, begun)
            at += 1

    def _prose(self, at: int, begun: bool) -> None:
        """A line that is no object: words before the first one are the discussion of a bare document."""
        if self.bare and not begun:
            self.said.append(self.lines[at].strip())
        else:
            self._problem(at, "not a JSON object")

    def _problem(self, at: int, what: str) -> None:
        self.problems.append(Problem(self.first + at, what))

    def _object(self, at: int, column: int) -> int:
        """Reads the objects that begin on line `at`; returns the line to go on with."""
        line, reason = self.lines[at], "not a JSON object"
        while column < len(line):
            try:
                value, end = _one(line, column)
            except NotParsedError as error:
                reason = f"not a JSON object ({error})"
                break
            self._entry(at, value)
            start = BEFORE.match(line, end)
            if start is None:
                if not SKIPPED.fullmatch(line, end):
                    self._problem(at, f"text after the object: {line[end:].strip()[:40]!r}")
                return at + 1
            column = start.end()
        text = line[column:]
        last = self._last(at, text)
        if last > at:
            try:
                value, _ = _one("\n".join([text, *self.lines[at + 1 : last + 1]]))
                self._entry(at, value)
                return last + 1
            except NotParsedError:
                pass
        self._problem(at, reason)
        return max(last, at) + 1

    def _last(self, at: int, text: str) -> int:
        """The last line of the object that `text` begins: where its braces close, or before the next object."""
        depth = _depth(text)
        indent = len(self.lines[at]) - len(self.lines[at].lstrip())
        size = len(text)
        for after in range(at + 1, min(len(self.lines), at + LONGEST)):
            line = self.lines[after]
            size += len(line)
            begins = line.lstrip().startswith("{") and len(line) - len(line.lstrip()) <= indent
            if depth <= 0 or begins or size > 2**20 or (SKIPPED.fullmatch(line) and "`" in line):
                return after - 1
            depth += _depth(line)
            if depth <= 0:
                return after
        return at

    def _entry(self, at: int, value: Any) -> None:
        if not isinstance(value, Mapping):
            self._problem(at, "not a JSON object")
        elif set(map(str.lower, value)) == {"discussion"}:
            self.said.append(str(next(iter(value.values()))))
        else:
            take_entry(value, self.first + at, self.ablations.append, self.problems.append)


def take_entry(
    value: Mapping[str, Any],
    line: int,
    take: Callable[[Ablation], None],
    report: Callable[[Problem], None],
    *,
    all_keys: bool = False,
) -> None:
    """Hands a mapping on as an Ablation, or as the Problem that it is."""
    fields = known_fields(value, line, report, all_keys=all_keys)
    nested = fields.get("name")
    if isinstance(nested, Mapping) and len(value) == 1 and any(field_of(str(key)) for key in nested):
        fields = known_fields(nested, line, report, all_keys=all_keys)
    if isinstance(nested, list) and any(isinstance(each, Mapping) for each in nested):
        report(Problem(line, f"{next(iter(value))!r} is no field; did you mean 'ablations'?"))
        return
    try:
        take(ablation_of(fields, line, report))
    except UnreadableError as error:
        report(Problem(line, str(error)))


def _one(text: str, begin: int = 0) -> tuple[Any, int]:
    """The object at `begin`, and its end; where only a forgiving reader sees one, up to the line's last brace."""
    try:
        return parsed_at(text, begin)
    except NotParsedError:
        end = text.rfind("}") + 1
        if end <= begin or end == len(text) or not SKIPPED.fullmatch(text, end):
            raise
        return parsed_at(text[begin:end])[0], end


STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"|"|[{}]')


def _depth(line: str) -> int:
    """Braces opened less braces closed, outside strings; a quote that does not close on its line is skipped."""
    depth = 0
    for found in STRINGS.finditer(line):
        if found[0] == '"':
            return depth
        depth += {"{": 1, "}": -1}.get(found[0], 0)
    return depth
