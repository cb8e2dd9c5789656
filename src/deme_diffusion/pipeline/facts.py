"""What is known of hub names before they are here (`known.yaml`). No torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

KNOWN = Path(__file__).parent / "known.yaml"


@cache
def known() -> dict[str, Any]:
    """The facts by kind and name."""
    facts: dict[str, Any] = yaml.safe_load(KNOWN.read_text(encoding="utf-8"))
    return facts
