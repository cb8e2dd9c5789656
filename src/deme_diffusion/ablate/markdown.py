"""The published form: a reasoning trace and a plan in Markdown, perhaps inside HTML boxes, read line by line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from deme_diffusion.ablate.cleaning import unescaped
from deme_diffusion.ablate.entries import UnreadableError, ablation_of, field_of, shown
from deme_diffusion.ablate.html_text import Line, lines_of
from deme_diffusion.ablate.listing import split_items
from deme_diffusion.ablate.markdown_fields import Field, items_of, text_of
from deme_diffusion.ablate.markdown_lines import (
    BOLD_KEY,
    BULLET,
    LOOSE_TITLES,
    PLAN_TITLES,
    RULE,
    SETEXT,
    TRACE_TITLES,
    FieldLine,
    cells_of,
    field_line,
    heading_line,
    joined_headings,
    name_of,
    plain,
    title_key,
)
from deme_diffusion.ablate.plan import Ablation, Plan, Problem
from deme_diffusion.ablate.values import NotParsedError, parsed

LISTS = ("replacement", "metrics")


@dataclass
class Entry:
    """An ablation as it stands: its heading (level 0: it has none) and its fields; `at` is its line's index."""

    at: int
    line: int
    name: str = ""
    level: int = 0
    fields: dict[str, Field] = field(default_factory=dict)


def read_markdown(text: str) -> Plan:
    """The plan in a clean text; entries that cannot be read are its problems."""
    lines = joined_headings(lines_of(text))
    begin, end, start = sections(lines)
    entries = Reader(lines, start).entries()
    if start and not any(entry.fields for entry in entries):
        begin, end, start = 0, len(lines), 0
        entries = Reader(lines, 0).entries()
    ablations, problems = _read(entries, strict=start > 0)
    if not start:
        end = min((entry.at for entry in entries if "action" in entry.fields), default=end)
    return Plan(_discussion(lines[begin:end]), ablations, problems)


def sections(lines: Sequence[Line]) -> tuple[int, int, int]:
    """Indices: the discussion's first line and its end, and the plan's first line (0 where no heading begins one)."""
    titles = list(_titles(lines))
    traces = [at for at, title in titles if title in TRACE_TITLES]
    begin = traces[0] + 1 if traces else 0
    for wanted in (PLAN_TITLES, LOOSE_TITLES):
        plans = [at for at, title in titles if title in wanted]
        after = [at for at in plans if at >= begin]
        if after:
            return begin, after[0], after[0] + 1
        if plans and not traces:
            return begin, plans[0], plans[0] + 1
    return begin, len(lines), 0


def _titles(lines: Sequence[Line]) -> Iterator[tuple[int, str]]:
    for at, line in enumerate(lines):
        found = heading_line(line.text, lines[at + 1].text if at + 1 < len(lines) else "")
        if found and title_key(found[1]):
            yield at, title_key(found[1])


def _discussion(lines: Sequence[Line]) -> str:
    """The text of the reasoning, without the headings above it."""
    at = 0
    while at < len(lines) and _above_text(lines[at].text):
        at += 1
    return unescaped("\n".join(line.text for line in lines[at:])).strip()


def _above_text(line: str) -> bool:
    """Whether a line is blank, a heading, or what underlines one."""
    return not line.strip() or line.lstrip().startswith("#") or SETEXT.fullmatch(line.rstrip()) is not None


class Reader:
    """Collects the entries of the lines from `start` on."""

    def __init__(self, lines: Sequence[Line], start: int) -> None:
        self.lines, self.start = lines, start
        self.fields = [field_line(line.text) if at >= start else None for at, line in enumerate(lines)]
        self.following = self._following()
        self.found: list[Entry] = []
        self.open: Field | None = None
        self.header: list[str | None] = []
        self.header_at = 0
        self.after_blank = True

    def entries(self) -> list[Entry]:
        """The entries in their order, each with what stands under its fields."""
        for at in range(self.start, len(self.lines)):
            line = self.lines[at]
            if not line.text.strip():
                self.after_blank, self.header = True, []
                continue
            self._take(at, line)
            self.after_blank = False
        return self.found

    def _following(self) -> list[int]:
        """For each line the index of the next one that is not blank."""
        following, after = [0] * len(self.lines), len(self.lines)
        for at in range(len(self.lines) - 1, -1, -1):
            following[at] = after
            after = at if self.lines[at].text.strip() else after
        return following

    def _take(self, at: int, line: Line) -> None:
        below = self.lines[at + 1].text if at + 1 < len(self.lines) else ""
        given = self.fields[at]
        if RULE.fullmatch(line.text.rstrip()):
            return
        if line.text.lstrip().startswith("|") and self._row(at, line):
            return
        if given and not self._ends_section(line, given):
            self._field(at, line, given)
            return
        title = heading_line(line.text, below if not given else "") or self._named_below(at, line)
        if title:
            self._heading(at, line, *title)
        elif self.open:
            self._below(line)

    def _ends_section(self, line: Line, given: FieldLine) -> bool:
        """Whether a heading that reads like a field (`## Metrics`) stands above the ablations, not in one."""
        level = len(line.text.strip()) - len(line.text.strip().lstrip("#"))
        current = self.found[-1].level if self.found else 0
        return bool(level and not given.value and level <= current < 7)

    def _heading(self, at: int, line: Line, level: int, title: str) -> None:
        self.found.append(Entry(at, line.number, _name_in(title), level))
        self.open = None

    def _field(self, at: int, line: Line, given: FieldLine) -> None:
        current = self.found[-1] if self.found else None
        begins = given.name in ("name", "ablated_part", "action")
        if current is None or (begins and given.name in current.fields) or (given.name == "name" and current.fields):
            if not begins:
                return
            current = Entry(at, line.number)
            self.found.append(current)
        self.open = Field(line.number, line.indent, given.value)
        before = current.fields.get(given.name)
        if before is None:
            current.fields[given.name] = self.open
        else:  # a second line of replacements
            before.below += [(99, item, True) for item in split_items(given.value)]
            self.open = before

    def _named_below(self, at: int, line: Line) -> tuple[int, str] | None:
        """A line that is a name because an ablation's first field stands under it."""
        after = self.following[at]
        given = self.fields[after] if after < len(self.lines) else None
        text = line.text.strip()
        if given is None or given.name not in ("name", "ablated_part", "action") or len(text) > 300:
            return None
        bullet, current = BULLET.match(text), self.found[-1] if self.found else None
        if current and current.fields and given.name not in current.fields:
            return None
        if self.open and bullet and self.open.below and self.open.below[-1][0] == line.indent:
            return None  # the last item of a list
        if not bullet and not self.after_blank and current:
            return None
        if current and not current.fields and current.at == at - 1 and not bullet:
            return None  # a remark under the heading
        return 8, BULLET.sub("", text, count=1) if bullet else text

    def _below(self, line: Line) -> None:
        """A line under an open field: an item, or the rest of the line above."""
        field_, text = self.open, line.text.strip()
        assert field_ is not None
        bullet = BULLET.match(text)
        nothing = not field_.inline and not field_.below
        if bullet:
            beside = line.indent <= field_.indent
            if beside and (
                field_.inline or BOLD_KEY.match(text) or (field_.below and field_.below[0][0] > line.indent)
            ):
                self.open = None
                return
            field_.below.append((line.indent, text[bullet.end() :], True))
        elif (self.after_blank and not nothing and line.indent <= field_.indent) or BOLD_KEY.match(text):
            self.open = None
        else:
            field_.below.append((line.indent, text, False))

    def _row(self, at: int, line: Line) -> bool:
        """A row of a table with an ablation a row; its header names the fields."""
        cells = cells_of(line.text)
        names = [field_of(plain(cell)) for cell in cells]
        if sum(name is not None for name in names) >= 2 and "action" in names:
            self.header, self.header_at = names, at
            return True
        if not self.header:
            return False
        if any(cell.strip(":- ") for cell in cells):
            entry = Entry(self.header_at, line.number)
            for name, cell in zip(self.header, cells, strict=False):
                if name:
                    entry.fields[name] = Field(line.number, 0, cell)
            self.found.append(entry)
            self.open = None
        return True


def _name_in(title: str) -> str:
    """The name in a heading; `Name: x` says x."""
    given = field_line(title)
    return name_of(given.value if given and given.name == "name" and given.value else title)


def _read(entries: Sequence[Entry], *, strict: bool) -> tuple[list[Ablation], list[Problem]]:
    """The ablations, and why the others are none; without a plan's heading, prose that resembles a field is skipped."""
    ablations: list[Ablation] = []
    problems: list[Problem] = []
    levels = {entry.level for entry in entries if "action" in entry.fields and 0 < entry.level < 7}
    for entry in entries:
        if not entry.fields:
            if entry.level in levels and strict:
                problems.append(Problem(entry.line, f"{shown(entry.name)} has no fields (Ablated Part, Action, ...)"))
            continue
        if not strict and not {"action", "ablated_part"} & entry.fields.keys():
            continue
        try:
            ablations.append(ablation_of(_values(entry), entry.line, problems.append))
        except (UnreadableError, NotParsedError) as error:
            at = entry.fields["action"].line if "action" in entry.fields else entry.line
            problems.append(Problem(at, str(error)))
    return ablations, problems


def _values(entry: Entry) -> dict[str, Any]:
    """The entry's fields as `ablation_of` takes them."""
    values: dict[str, Any] = {"name": entry.name} if entry.name else {}
    for name, each in entry.fields.items():
        if name in LISTS:
            values[name] = items_of(each, metrics=name == "metrics")
        elif name in ("set", "sets"):
            values[name] = parsed(unescaped(each.inline.strip("` ")))
        else:
            values[name] = text_of(each) or values.get(name, "")
    return values
