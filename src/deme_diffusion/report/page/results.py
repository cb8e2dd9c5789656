"""The verdict and the table of a page."""

from __future__ import annotations

from collections.abc import Sequence
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
from deme_diffusion.report.verdict import verdict

FIRST = ("base", "merged")  # so that they are in sight where the table has to be scrolled
BADGES = {True: "helps", False: "no gain shown", None: "not conclusive"}
KINDS = {"merged": "ours", REAL_IMAGES: "real"}


def verdict_section(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The verdict in a sentence, and how it is marked."""
    if not rows:
        return None
    result = verdict(rows)
    kind = {True: "yes", False: "no", None: "open"}[result.helps]
    return {"sentence": result.sentence, "badge": BADGES[result.helps], "kind": kind}


def table_section(rows: list[Row]) -> dict[str, Any] | None:
    """Models across (base and merged first), metrics down; a rule above each group that shares one protocol."""
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: FIRST.index(row["model"]) if row["model"] in FIRST else len(FIRST))
    kinds = [KINDS.get(row["model"], "") for row in rows]
    lines, protocol = [], ""
    for metric, line in cells(rows).items():
        before, protocol = protocol, protocol_text(rows, metric)
        arrow = {"lower": "↓", "higher": "↑", None: ""}[direction(metric)]
        parts = [(kind, cell.best, *cell.text.partition(" ± ")[::2]) for kind, cell in zip(kinds, line, strict=True)]
        lines.append({"metric": metric, "cells": parts, "rule": protocol != before, "arrow": arrow})
    models = list(zip(kinds, (row["model"] for row in rows), strict=True))
    return {"models": models, "lines": lines, "protocols": protocol_lines(rows), "reasons": reason_lines(rows)}
