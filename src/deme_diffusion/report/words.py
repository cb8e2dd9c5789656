"""Words that the page's sections and the card share: which seed they show, numbers and sentences, lists that end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

MOST_NAMED = 6
"""Names or numbers that a sentence lists; of more it tells the first and last, or the least and greatest."""
MOST_ALT = 340
"""Characters of a list in an alternative text: with the words before it about 400, since it is heard."""
AT_ONCE, LITTLE = 450, 120
"""Characters of a caption that are shown, and that are not worth folding."""
LONGEST = 300
"""Characters of a line on weights that is told: of a hundred experts it lists a hundred."""
SHORT = ("al.", "Fig.", "Eq.", "Sec.", "e.g.", "i.e.", "cf.", "vs.", "approx.", "No.")
COUNTED = re.compile(r"(?<![\w.,])\d{4,}(?= (?:images|trials|points|steps|evaluations)\b)")


def seeds_said(run: Mapping[str, Any]) -> str:
    """What a section of one training seed says where the table has several; '' where there is one."""
    seeds = list(run.get("seeds") or ())
    if len(seeds) < 2:
        return ""
    over = ", ".join(map(str, seeds)) if len(seeds) <= MOST_NAMED else f"{len(seeds)} seeds"
    return f"training seed {seeds[0]}; the table is over {over}"


def bounded(parts: Iterable[str], most: int = MOST_ALT) -> str:
    """Parts joined by semicolons, as many as there is room for, and how many more there are."""
    parts = list(parts)
    ends = accumulate(len(part) + 2 for part in parts)
    kept = parts[: max(1, sum(end - 2 <= most for end in ends))]
    more = f"; and {len(parts) - len(kept)} more" if len(kept) < len(parts) else ""
    text = "; ".join(kept)
    return (text if len(text) <= most else f"{text[: most - 1]}…") + more


def grouped(text: str) -> str:
    """The same with thousands separators in what it counts: `1,000 images`."""
    return COUNTED.sub(lambda found: f"{int(found[0]):,}", text)


def sentence(line: str) -> str:
    """A line of a log as a sentence: a capital, and a full stop."""
    return grouped(f"{line[:1].upper()}{line[1:]}.") if line else ""


def weights_said(run: Mapping[str, Any]) -> list[str]:
    """What a terminal says of the merge weights: what the merged model then is, and which gain was noise."""
    lost = list(run.get("lost_gains") or ())
    lines = [line for line in run.get("weights_found") or () if line not in lost]
    told = [line for line in lines[:MOST_NAMED] if len(line) <= LONGEST]
    more = [f"the weights of {len(lines) - len(told)} more merges are in their merge.json"] if told != lines else []
    return [sentence(line) for line in (*told, *more, *lost[:MOST_NAMED])]


def two_parts(caption: str) -> tuple[str, str]:
    """What a caption says at once, and what is folded: parted by its newline, else after two sentences or `AT_ONCE`."""
    if "\n" in caption:
        shown, _, rest = caption.partition("\n")
        return shown.strip(), " ".join(rest.split())
    found, count = sentences(caption), 2
    while len(" ".join(found[: count + 1])) <= AT_ONCE and count < len(found):
        count += 1
    shown, rest = " ".join(found[:count]), " ".join(found[count:])
    return (shown, rest) if len(rest) > LITTLE else (" ".join(found), "")


def sentences(text: str) -> list[str]:
    """Text parted at the ends of its sentences: not inside brackets, nor after an abbreviation or within a number."""
    found, start, depth = [], 0, 0
    for i, mark in enumerate(text):
        depth = max(0, depth + (mark in "([{") - (mark in ")]}"))
        if (
            mark in ".!?"
            and text[i + 1 : i + 2] == " "
            and not _goes_on(text[start : i + 1], text[i + 2 : i + 3], depth)
        ):
            found.append(text[start : i + 1].strip())
            start = i + 1
    return [part for part in (*found, text[start:].strip()) if part]


def _goes_on(before: str, after: str, depth: int) -> bool:
    """Whether a full stop ends no sentence. The half-open ranges of timesteps, as in [0,250), close no bracket."""
    return depth > 0 or before.endswith(SHORT) or after.isdigit() or (after.isascii() and after.islower())
