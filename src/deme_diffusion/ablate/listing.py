"""One line of text that lists several things, to those things."""

from __future__ import annotations

import re
from collections.abc import Iterator

NONE = {"none", "n a", "na", "null", "nil", "not applicable", "nothing", "no replacement", "not needed", ""}
SEPARATORS = re.compile(r"""&#?\w{1,31};|[()\[\]{}"“”`;,]|\s/\s|\s(?:and|or|&)\s""", re.IGNORECASE)
CLOSING = {"(": ")", "[": "]", "{": "}", '"': '"', "“": "”", "`": "`"}
WORDS_OF_AN_ITEM = 6
LONGEST = 20_000
"""Characters of a line that may be a list."""
SENTENCE = re.compile(
    r"(?:which|where|so|but|while|because|as|since|thus|i\.?e|e\.?g|with|using|instead|rather|then|to|without|such|"
    r"including|that|this|it|we|if|when|for example|followed)\b",
    re.IGNORECASE,
)
JOINER = re.compile(r"(?:and|or|&)\s+", re.IGNORECASE)


def is_none(text: str) -> bool:
    """Whether a text says that there is nothing (`None`, `N/A`, `-`)."""
    return len(text) < 40 and " ".join(re.findall(r"[^\W_]+", text.casefold())) in NONE and "&#" not in text


def split_items(text: str, *, metrics: bool = False) -> list[str]:
    """The things that a line lists.

    Semicolons always separate, commas where what stands between them is short and no clause; neither inside brackets,
    quotes or numbers. `and` separates metrics, `or` replacements of several words.
    """
    if is_none(text):
        return []
    if len(text) > LONGEST:
        return [text.strip()]
    cuts = list(_outside(text))
    parts = _cut(text, [cut for cut in cuts if cut[2] == ";"])
    if len(parts) > 1:
        return parts
    parts = _cut(text, [cut for cut in cuts if cut[2] == ","])
    parts = [*parts[:-1], JOINER.sub("", parts[-1], count=1)] if len(parts) > 1 and JOINER.match(parts[-1]) else parts
    if len(parts) > 1:
        return _joined(parts, metrics) if _is_list(text, parts) else [text.strip()]
    return _joined([text.strip()], metrics)


def _joined(parts: list[str], metrics: bool) -> list[str]:
    """Splits `FID and CLIP score` among metrics, `random cuts or shared borders` among replacements."""
    joiners = ("and", "&", "/") if metrics else ("or",)
    found: list[str] = []
    for part in parts:
        pieces = _cut(part, [cut for cut in _outside(part) if cut[2].strip().lower() in joiners])
        shortest = 1 if metrics else 2
        sizes = [len(piece.split()) for piece in pieces]
        fits = _is_list(part, pieces) and min(sizes, default=0) >= shortest
        clause = re.search(r"\b(?:between|both|whether|either|two|one|three)\b", part, re.IGNORECASE)
        found += pieces if fits and not clause else [part]
    return found


def _is_list(text: str, parts: list[str]) -> bool:
    """Whether the parts read as entries of a list, not as clauses of a sentence."""
    if text.rstrip().endswith(".") and len(text.split()) > 10:
        return False
    return all(len(part.split()) <= WORDS_OF_AN_ITEM for part in parts) and not any(map(SENTENCE.match, parts[1:]))


def _outside(text: str) -> Iterator[tuple[int, int, str]]:
    """Separators (start, end, what) that stand in no brackets or quotes that close, and in no number or entity."""
    pending: list[tuple[int, int, str]] = []
    open_: list[str] = []
    for found in SEPARATORS.finditer(text):
        mark = found[0]
        if open_ and mark == CLOSING[open_[-1]]:
            open_.pop()
            if not open_:
                pending.clear()
        elif mark in CLOSING and len(open_) < 100 and not (open_ and open_[-1] in '"“`'):
            open_.append(mark)
        elif mark[0] != "&" and mark not in ")]}”" and not _in_number(text, found.start(), mark):
            cut = (found.start(), found.end(), mark)
            if not open_:
                yield cut
            else:
                pending.append(cut)
    if open_:  # what never closes protects nothing
        yield from pending


def _in_number(text: str, at: int, mark: str) -> bool:
    return mark == "," and text[at + 1 : at + 2].isdigit() and text[at - 1 : at].isdigit()


def _cut(text: str, cuts: list[tuple[int, int, str]]) -> list[str]:
    """The pieces between the cuts, without blanks or empty ones."""
    edges = [0, *(edge for start, end, _ in sorted(cuts) for edge in (start, end)), len(text)]
    pieces = [text[edges[i] : edges[i + 1]].strip() for i in range(0, len(edges), 2)]
    return [piece for piece in pieces if piece] or [text.strip()]
