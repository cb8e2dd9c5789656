"""Which part of the method an ablation speaks of, with a score, or why that cannot be said. No torch.

Each row of the parts table, and of what is known not to be a part, is scored on the ablated part (weight `PART`), the
ablation's name (`NAME`) and its replacements (`REPLACEMENTS`, the best of them); texts that fit no row at all are left
out of the mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from deme_diffusion.ablate.foreign import FOREIGN
from deme_diffusion.ablate.matching import MARGIN, STRICT, concepts, ranked, score
from deme_diffusion.ablate.parts import PARTS
from deme_diffusion.ablate.plan import Ablation
from deme_diffusion.ablate.rows import Foreign, Part
from deme_diffusion.ablate.text import normalised

PART, NAME, REPLACEMENTS = 0.75, 0.15, 0.1
ALONE = 0.85
"""What counts of a score where the ablated part's own text fits no row."""
_LISTED = 0.9
_ROWS: dict[str, Part | Foreign] = {**PARTS, **{row.name: row for row in FOREIGN}}
_AND = re.compile(r",|;|/|\+|&|\(|\)|:|\band\b|\bas well as\b|\bplus\b")


@dataclass(frozen=True)
class Spoken:
    """The part, or none and the reason; `several` where a text lists several parts; `nearest` the best others."""

    part: Part | None = None
    score: float = 0.0
    reason: str = ""
    nearest: tuple[str, ...] = ()
    several: tuple[Part, ...] = ()


def spoken(ablation: Ablation) -> Spoken:
    """The part that an ablation speaks of."""
    if (named := _by_path(ablation.ablated_part)) is not None:
        return Spoken(named, 1.0)
    several = listed(ablation.ablated_part)
    if len(several) > 1:
        return Spoken(several[0], _LISTED, several=several)
    order = ranked(_scores(ablation))
    if not order or order[0][1] < STRICT.least - 1e-9:
        return _unknown(ablation, order)
    (best, value), *others = order
    row, near = _ROWS[best], tuple(name for name, _ in others if name in PARTS)[:3]
    if isinstance(row, Foreign):
        return Spoken(None, value, f"{row.name}: {row.reason}", row.nearest)
    rivals = [name for name, other in others if value - other < MARGIN]
    if strangers := [name for name in rivals if not _related(row, name)]:
        either = ", ".join([best, *strangers][:3])
        return Spoken(None, value, f"it could be any of: {either}; name one", (best, *strangers))
    return Spoken(_chosen(ablation, [best, *rivals]), value, "", near)


def _by_path(text: str) -> Part | None:
    """The part whose setting a text is the name of."""
    path = text.strip().strip("`").casefold()
    return next((part for part in PARTS.values() if path in (part.path, part.path.partition(".")[2])), None)


def listed(text: str) -> tuple[Part, ...]:
    """The parts that a text lists ("probabilistic sampling and consistency loss"), where it lists nothing else."""
    found: list[Part] = []
    for piece in _AND.split(normalised(text)):
        if not concepts(piece):
            continue
        order = ranked({name: score(piece, row.names, frozenset(), STRICT) for name, row in _ROWS.items()})
        if not order or order[0][1] < _LISTED or not isinstance(row := _ROWS[order[0][0]], Part):
            continue
        found += [row] if row not in found else []
    related = any(_related(a, b.name) for a in found for b in found if a is not b)
    found = [row for row in found if row.name != "finetuning techniques"] if len(found) > 2 else found
    return () if related else tuple(found)


def _scores(ablation: Ablation) -> dict[str, float]:
    texts: list[tuple[float, Iterable[str]]] = [
        (PART, [ablation.ablated_part]),
        (NAME, [ablation.name]),
        (REPLACEMENTS, ablation.replacement),
    ]
    tables = [(weight, _table(list(entries), weight == REPLACEMENTS)) for weight, entries in texts]
    tables = [(weight, table) for weight, table in tables if any(table.values())]
    total = sum(weight for weight, _ in tables) or 1.0
    if not tables or tables[0][0] == REPLACEMENTS:
        return {}  # a replacement alone says nothing: of what?
    factor = 1.0 if tables[0][0] == PART else ALONE
    return {name: factor * sum(weight * table[name] for weight, table in tables) / total for name in _ROWS}


def _table(entries: list[str], replacements: bool) -> dict[str, float]:
    """Each row's best score over some texts; a row also knows the names of its replacements."""
    return {name: max((_fit(row, text, replacements) for text in entries), default=0.0) for name, row in _ROWS.items()}


def _fit(row: Part | Foreign, text: str, replacements: bool) -> float:
    value = score(text, row.names, row.field if isinstance(row, Part) else frozenset(), STRICT)
    if not replacements or isinstance(row, Foreign):
        return value
    own = (score(text, replacement.names, row.field) for replacement in row.replacements)
    return max(value, *own, 0.0)


def _related(row: Part, name: str) -> bool:
    other = _ROWS[name]
    return isinstance(other, Part) and (name in row.also or row.name in other.also)


def _chosen(ablation: Ablation, names: list[str]) -> Part:
    """Of parts of one field, the first that takes the action, and whose replacements are meant."""
    parts = [PARTS[name] for name in names]
    able = [part for part in parts if ablation.action in part.actions] or parts
    if ablation.action == "REMOVE":
        return able[0]
    return max(able, key=lambda part: max((_fit(part, text, True) for text in ablation.replacement), default=0.0))


def _unknown(ablation: Ablation, order: list[tuple[str, float]]) -> Spoken:
    near = tuple(name for name, _ in order if name in PARTS)[:3]
    closest = f"; nearest: {', '.join(near)}" if near else ""
    value = order[0][1] if order else 0.0
    if order and isinstance(row := _ROWS[order[0][0]], Foreign):
        return Spoken(None, value, f"{row.name}: {row.reason}", row.nearest)
    return Spoken(None, value, f"no part of this method is surely meant by {ablation.ablated_part!r}{closest}", near)
