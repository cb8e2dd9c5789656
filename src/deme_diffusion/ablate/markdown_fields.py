"""A field of a Markdown plan as it stands, to a text or to a list of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deme_diffusion.ablate.cleaning import unescaped
from deme_diffusion.ablate.listing import is_none, split_items
from deme_diffusion.ablate.markdown_lines import plain
from deme_diffusion.ablate.values import NotParsedError, parsed


@dataclass
class Field:
    """A field as it stands: what its line says, and the lines below it as (indent, text, bulleted)."""

    line: int
    indent: int
    inline: str
    below: list[tuple[int, str, bool]] = field(default_factory=list)


def text_of(each: Field) -> str:
    """A field that is one text, with the lines it runs over."""
    bulleted = [text for _, text, bullet in each.below if bullet]
    wrapped = [text for _, text, bullet in each.below if not bullet]
    return plain(" ".join([each.inline, *(wrapped if each.inline or wrapped else bulleted[:1])]))


def items_of(each: Field, *, metrics: bool) -> list[Any]:
    """A field that is a list: on its line, or one entry a line below."""
    bullets = any(bullet for _, _, bullet in each.below)
    inline = each.inline
    if inline and not bullets:
        inline = " ".join([inline, *(text for _, text, _ in each.below)])
    items = [] if inline.endswith(":") and bullets else _inline(inline, metrics=metrics)
    return items + (_items(each.below) if bullets or not each.inline else [])


def _inline(text: str, *, metrics: bool) -> list[Any]:
    if is_none(text):
        return []
    bare = text.strip("` ")
    if bare[:1] in ("[", "{") and bare[-1:] in ("]", "}"):
        try:
            value = parsed(unescaped(bare))
            return value if isinstance(value, list) else [value]
        except NotParsedError:
            pass
    pieces = split_items(bare[1:-1] if bare[:1] == "[" and bare[-1:] == "]" else text, metrics=metrics)
    return [plain(piece) for piece in pieces]


def _items(below: Sequence[tuple[int, str, bool]]) -> list[str]:
    """The entries of a list; what stands deeper than the first belongs to the entry above."""
    items: list[str] = []
    heads: list[str] = []
    bullets = any(bullet for _, _, bullet in below)
    first = next((indent for indent, _, bullet in below if bullet), 0)
    for indent, raw, bullet in below:
        text = plain(raw)
        if not text or (len(below) == 1 and is_none(raw)):
            continue
        if not items or (bullet and indent <= first) or indent == 99 or not bullets:
            items.append(text)
            heads.append(text)
        elif not bullet:
            items[-1] += f" {text}"
        elif heads[-1].endswith(":"):
            items[-1:] = [*([] if items[-1] == heads[-1] else [items[-1]]), f"{heads[-1]} {text}"]
        else:
            items[-1] += f"{'; ' if items[-1] != heads[-1] else ': '}{text}"
    return items
