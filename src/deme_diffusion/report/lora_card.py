"""README.md of a LoRA expert: what it is beside, and how stock diffusers loads it. No torch."""

from __future__ import annotations

from deme_diffusion.report.card import fenced
from deme_diffusion.report.tables import escape_markdown


def lora_card(label: str, base: str, component: str, *, averaged: bool) -> str:
    """Of an expert's artefact."""
    kept = "It is the average over the training (EMA); `raw` holds the last one itself." if averaged else ""
    parts = [
        f"# {escape_markdown(label)}",
        f"A LoRA for the {component} of {escape_markdown(base)}, which it needs beside it.",
        kept,
        _loading(base),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _loading(base: str) -> str:
    """The lines by which stock diffusers loads it."""
    lines = [
        "from diffusers import DiffusionPipeline",
        f"pipeline = DiffusionPipeline.from_pretrained({base!r})",
        'pipeline.load_lora_weights("path/to/this/folder")',
    ]
    return fenced("\n".join(lines), "python")
