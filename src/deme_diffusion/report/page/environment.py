"""The templates of all pages: every text escaped, a missing value is an error."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent.parent / "templates"


def environment() -> Environment:
    """The templates; `base.html` is the layout, `page/` has the sections, `page/macros.html` images and tables."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["pieces"] = _pieces
    return made


def _pieces(text: str) -> list[str]:
    """Text split where a line may break: after dots, commas, equals signs and underscores, not inside words."""
    return re.split(r"(?<=[.,=_])(?=[^\s\d])", text)
