"""HTML as text: tags are dropped or become Markdown's marks, scripts and styles vanish, nothing is rendered."""

from __future__ import annotations

import re
from dataclasses import dataclass

BREAK = "\x1e"
"""A line that a tag begins; `clean` leaves no such character in a text."""

BLOCKS = "div|section|article|main|header|footer|body|html|head|p|ul|ol|dl|dt|dd|table|thead|tbody|blockquote|pre|hr|br"
BLOCKS += "|details|summary|title|figure|center|nav|form"
INLINE = "span|a|em|i|u|code|font|small|big|sub|sup|img|mark|meta|link|input|button|svg|path|iframe|s|kbd|label"
TAG = re.compile(
    rf"<(/?)(?:(h)([1-6])|(li)|(strong|b)|(tr)|(td|th)|({BLOCKS})|(?:{INLINE}|script|style))(?=[\s/>])[^<>]*>"
    r"|<!doctype[^<>]*>",
    re.IGNORECASE,
)
UNSEEN = re.compile(r"<(?:(script|style)(?=[\s>])[^<>]*>|!--)", re.IGNORECASE)
CLOSERS = {
    "script": re.compile(r"</script[^<>]*>", re.IGNORECASE),
    "style": re.compile(r"</style[^<>]*>", re.IGNORECASE),
    "--": re.compile("-->"),
}


@dataclass(frozen=True)
class Line:
    """A line of a document as text, with its number in the file."""

    number: int
    text: str

    @property
    def indent(self) -> int:
        """Columns before its first character, a tab being four."""
        expanded = self.text.expandtabs(4)
        return len(expanded) - len(expanded.lstrip())


def lines_of(text: str) -> list[Line]:
    """The lines of a clean text, its HTML dropped; a line that held nothing but tags is none."""
    lines = []
    for number, source in enumerate(TAG.sub(_mark, without_unseen(text)).split("\n"), 1):
        pieces = source.split(BREAK)
        if len(pieces) > 1 and pieces[0].lstrip().startswith("|"):
            pieces = ["; ".join(piece.strip() for piece in pieces if piece.strip())]
        lines += [Line(number, piece) for piece in pieces if len(pieces) == 1 or piece.strip()]
    return lines


def _mark(found: re.Match[str]) -> str:
    """What a tag leaves in the text: as many line ends as it had, and Markdown's mark of what it means."""
    ends, (close, heading, level, item, bold, row, cell, block) = "\n" * found[0].count("\n"), found.groups()
    if heading:
        return ends + BREAK + ("" if close else "#" * int(level) + " ")
    if item or row:
        return ends + BREAK + ("" if close else "- " if item else "| ")
    if bold:
        return ends + "**"
    if cell:
        return ends + (" | " if close else "")
    return ends + (BREAK if block else "")


def without_unseen(text: str) -> str:
    """The text without scripts, styles and comments, their line ends kept; what never closes is text."""
    kept: list[str] = []
    at, lost = 0, set[str]()
    for opened in UNSEEN.finditer(text):
        kind = (opened[1] or "--").lower()
        if opened.start() < at or kind in lost:
            continue
        closed = CLOSERS[kind].search(text, opened.end())
        if closed is None:
            lost.add(kind)
            continue
        kept += [text[at : opened.start()], BREAK, "\n" * text.count("\n", opened.start(), closed.end())]
        at = closed.end()
    return "".join(kept) + text[at:] if kept else text
