"""What an ablation experiment shows: verdicts, tables, figures and a page beside its `ablation.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group

from deme_diffusion.files import write_bytes, write_text
from deme_diffusion.report import ablation_text as text
from deme_diffusion.report.ablation_figure import effects_figure
from deme_diffusion.report.ablation_page import ablation_page
from deme_diffusion.report.ablation_sentences import AblationVerdict, verdicts
from deme_diffusion.report.ablation_together import together
from deme_diffusion.report.page import write_page

__all__ = ["AblationVerdict", "rich_tables", "together", "verdicts", "write_ablation"]


def write_ablation(folder: Path, content: Mapping[str, Any]) -> list[str]:
    """Write ablation.md, ablation.csv, effects.svg, effects.png and report.html; the verdicts, one an ablation."""
    found = verdicts(content)
    svg, png = effects_figure(found)
    write_text(folder / "ablation.md", text.to_markdown(content, found))
    write_text(folder / "ablation.csv", text.to_csv(content, found))
    write_bytes(folder / "effects.svg", svg)
    write_bytes(folder / "effects.png", png)
    write_page(folder, ablation_page(content))
    return [one.sentence for one in found]


def rich_tables(content: Mapping[str, Any]) -> list[Group]:
    """A table an ablation for the terminal, with its notes below."""
    return text.rich_tables(content, verdicts(content))
