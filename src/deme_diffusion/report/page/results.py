"""The verdict and the table of a page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from deme_diffusion.report.cells import (
    REAL_IMAGES,
    Row,
    cells,
    direction,
    protocol_lines,
    protocol_text,
    reason_lines,
)
from deme_diffusion.report.glossary import spreads_said
from deme_diffusion.report.verdict import verdict

FIRST = ("base", "merged")  # so that they are in sight where the table has to be scrolled
BADGES = {True: "helps", False: "no gain shown", None: "not conclusive"}
COLOURED = {True: "yes", False: "no", None: "open"}
"""The verdict's class in the style sheet."""
KINDS = {"merged": "ours", REAL_IMAGES: "real"}


def verdict_section(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The verdict in a sentence, and how it is marked."""
    if not rows:
        return None
    result = verdict(rows)
    return {"sentence": result.sentence, "badge": BADGES[result.helps], "kind": COLOURED[result.helps]}


def table_section(rows: list[Row], elsewhere: Collection[str] = ()) -> dict[str, Any] | None:
    """Models across (base and merged first), metrics down; a rule above each group that shares one protocol.

    `elsewhere`: metrics that another section shows.
    """
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: FIRST.index(row["model"]) if row["model"] in FIRST else len(FIRST))
    kinds = [KINDS.get(row["model"], "") for row in rows]
    lines, protocol = [], ""
    for metric, line in cells(rows).items():
        if metric in elsewhere:
            continue
        before, protocol = protocol, protocol_text(rows, metric)
        arrow = {"lower": "↓", "higher": "↑", None: ""}[direction(metric)]
        parts = [(kind, cell.best, *cell.text.partition(" ± ")[::2]) for kind, cell in zip(kinds, line, strict=True)]
        lines.append({"metric": metric, "cells": parts, "rule": protocol != before, "arrow": arrow})
    models = list(zip(kinds, (row["model"] for row in rows), strict=True))
    told = {"protocols": protocol_lines(rows), "reasons": reason_lines(rows), "spreads": list(spreads_said(rows))}
    return {"models": models, "lines": lines, "elsewhere": bool(elsewhere), **told}
