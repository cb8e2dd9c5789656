"""What a line of a Markdown plan is: a heading, a field, an item of a list."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deme_diffusion.ablate.cleaning import one_line, unescaped
from deme_diffusion.ablate.entries import field_of, key_of
from deme_diffusion.ablate.html_text import Line

PLAN_TITLES = {
    f"{before}{title}".strip()
    for before in ("", "the ", "proposed ", "my ", "our ", "final ")
    for title in ("ablation plan", "ablation plans", "ablations plan", "ablation study plan", "ablation studies plan")
}
LOOSE_TITLES = {"plan", "ablations", "proposed ablations", "planned ablations", "suggested ablations", "predictions"}
LOOSE_TITLES |= {"ablation studies", "ablation experiments", "proposed ablation studies", "experiment plan"}
TRACE_TITLES = {"reasoning trace", "reasoning", "discussion", "thoughts", "thinking", "trace", "analysis", "rationale"}

ATX = re.compile(r"(#+)\s*(.*)", re.DOTALL)
SETEXT = re.compile(r"\s{0,3}(?:={3,}|-{3,})")
RULE = re.compile(r"\s*(?:-{3,}|\*{3,}|_{3,}|={3,}|[`~]{3,}[A-Za-z]{0,20})")
BULLET = re.compile(
    r"(?:[-*+•‣◦▪▫●○·\u2013\u2014]|\(?\d{1,4}[.)]|\(?[A-Za-z]\))(?=\s|\*\*|__)\s*(?:\[[ xX]\]\s+)?|[•‣◦▪●]\s*"
)
NUMBER = re.compile(r"\(?\d{1,4}[.):]\s+|\d{1,4}[.)](?=\*\*)")
COUNTED = re.compile(r"(?:ablation|experiment|study|arm|entry)\s+#?\d{1,4}\b", re.IGNORECASE)
COLUMNS = 30
LONGEST_TITLE = 2000
KEY = r"([A-Za-z][A-Za-z0-9 _/()-]{0,40}?)"
FIELD = re.compile(
    rf"[\W_]{{0,24}}(?:\d{{1,3}}[.):]\s{{0,4}}[\W_]{{0,8}})?{KEY}[*_`\"'\])]{{0,6}}\s{{0,8}}"
    r"(?:[:\uff1a=→]|->|\s[-\u2013\u2014](?=\s)|[\u2013\u2014])([*_]{0,3})(.*)",
    re.DOTALL,
)
BOLD_FIELD = re.compile(rf"[\W_]{{0,24}}(?:\d{{1,3}}[.):]\s{{0,4}})?(\*\*|__){KEY}\1\s*(.*)", re.DOTALL)
BOLD_KEY = re.compile(r"\W{0,12}(?:\*\*|__)[^*:]{1,80}(?::\s?(?:\*\*|__)|(?:\*\*|__)\s?:)")


@dataclass(frozen=True)
class FieldLine:
    """A line that gives a field (or, in a row of a table, several)."""

    name: str
    value: str


def field_line(text: str) -> FieldLine | None:
    """The field that a line gives or opens, in any of the styles of bullets and emphasis."""
    text = text.strip()
    if text.startswith("|"):
        cells = cells_of(text)
        name = field_of(plain(cells[0])) if len(cells) == 2 else None
        return FieldLine(name, cells[1]) if name and not field_of(plain(cells[1])) else None
    for pattern in (FIELD, BOLD_FIELD):
        found = pattern.match(text)
        key = found and found[2 if pattern is BOLD_FIELD else 1]
        name = key and field_of(key)
        if found and name:
            return FieldLine(name, _value(found, pattern))
    heading = ATX.match(text)
    name = field_of(heading[2].strip("*_`: ")) if heading and "&" not in text and len(text) < 80 else None
    return FieldLine(name, "") if name else None


def _value(found: re.Match[str], pattern: re.Pattern[str]) -> str:
    """What follows the key; emphasis that began before the key ends with it."""
    value = found[3].strip()
    if pattern is FIELD and not found[2]:
        for mark in ("**", "__"):
            if value.endswith(mark) and value.count(mark) == 1:
                value = value[: -len(mark)]
    return value.strip()


def cells_of(row: str) -> list[str]:
    """The cells of a table's row."""
    inner = row.strip().removeprefix("|")
    return [cell.strip() for cell in inner.removesuffix("|").split("|", COLUMNS)]


def bold_only(text: str) -> str | None:
    """The text of a line that is nothing but bold, without bullet or number."""
    bare = text.strip()
    mark = BULLET.match(bare)
    bare = (bare[mark.end() :] if mark else bare).rstrip(": ")
    for emphasis in ("**", "__"):
        if bare.startswith(emphasis) and bare.endswith(emphasis) and bare.count(emphasis) == 2 and len(bare) > 4:
            return bare[2:-2].strip()
    return None


def heading_line(text: str, below: str) -> tuple[int, str] | None:
    """(level, title) of a heading whatever follows it: `#`, underlined (`below`: the next line), bold, `Ablation 3`."""
    stripped = text.strip().lstrip("> ")
    if len(stripped) > LONGEST_TITLE and stripped[0] != "#":
        return None
    if stripped.startswith("#"):
        found = ATX.match(stripped)
        title = found[2].strip() if found else ""
        return (len(found[1]), title.rstrip("#").strip() or title) if found and title else None
    if SETEXT.fullmatch(below.rstrip()) and not BULLET.match(stripped) and not stripped.startswith("|"):
        return (1 if "=" in below else 2), stripped
    bare = BULLET.sub("", stripped, count=1)
    if COUNTED.match(bare.lstrip("*_ ")) and len(bare) < 300:
        return 7, bare
    title = None if BULLET.match(stripped) else bold_only(stripped)
    return None if title is None else (7, title)


def title_key(title: str) -> str:
    """A heading's words, without numbers before them."""
    return key_of(title).lstrip("0123456789 ") if len(title) < 200 else ""


def plain(text: str) -> str:
    """Markdown's inline text as text: no emphasis, code marks, escapes or entities."""
    text = _balanced(_balanced(text.strip(), "**"), "`")
    for mark in ("__", "*", "_", '"', "“”"):
        first, last = mark[: max(1, len(mark) - (mark == "“”"))], mark[-1] if mark == "“”" else mark
        if text.startswith(first) and text.endswith(last) and len(text) > 2 * len(mark):
            inner = text[len(first) : -len(last)]
            text = text if first in inner or last in inner else inner.strip()
    return one_line(unescaped(re.sub(r"\\([*_#`<>~.+-])", r"\1", text)))


def _balanced(text: str, mark: str) -> str:
    """The text without the marks that stand in pairs; one left over at an end goes too."""
    parts = text.split(mark)
    if len(parts) % 2:
        return "".join(parts)
    if not parts[0] or not parts[-1]:
        return "".join(parts)
    return "".join(parts[:-1]) + mark + parts[-1]


def name_of(title: str) -> str:
    """An ablation's name out of its heading."""
    title = NUMBER.sub("", title.strip().lstrip("> "), count=1)
    inner = bold_only(title)
    return plain(inner if inner is not None else title)


def joined_headings(lines: list[Line]) -> list[Line]:
    """A heading that HTML wrote over two lines in one."""
    joined: list[Line] = []
    for line in lines:
        if joined and joined[-1].text.strip() in ("#", "##", "###", "####") and line.text.strip():
            joined[-1] = Line(joined[-1].number, f"{joined[-1].text.strip()} {line.text.strip()}")
        elif not (joined and joined[-1].text.strip() in ("#", "##", "###", "####")):
            joined.append(line)
    return joined
