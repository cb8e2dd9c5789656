"""Any plan document to a `Plan`: which form it is, and what no document may hold."""

from __future__ import annotations

from pathlib import Path

from deme_diffusion.ablate.plan import Plan


def read_plan(path: str | Path) -> Plan:
    """The plan in a document of any of the forms. Raises UserError for a file that is no text, or none at all."""
    raise NotImplementedError(path)
