"""What the doctor says: one line a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, how it is, and, where it is not well, what to do. `details` go below it."""

    status: Status
    topic: str
    text: str
    details: tuple[str, ...] = ()
