"""What the page shows of an ablation experiment: verdicts, tables, effects, and the divisions that arms try."""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from deme_diffusion.report.ablation_effects import Content, plain_text
from deme_diffusion.report.ablation_figure import ablation_figure
from deme_diffusion.report.ablation_sentences import AblationVerdict, verdicts
from deme_diffusion.report.ablation_tables import has_rows, protocols_of, table_of
from deme_diffusion.report.ablation_text import headlines, problems_of
from deme_diffusion.report.cells import compact
from deme_diffusion.report.figures import division_picture, division_tables

MOST_FIGURES = 40
"""Effects and divisions that one experiment's section draws; the tables are all there."""


def ablation_page(content: Content) -> dict[str, Any]:
    """The page of an experiment alone, as what `page.render_page` takes."""
    page = {"title": f"{plain_text(content['plan'])} · ablations of {plain_text(content['recipe'])}"}
    kept = {"command": content.get("command"), "provenance": content.get("provenance")}
    return {**page, **{key: value for key, value in kept.items() if value}, "ablations": [content]}


def ablation_section(content: Content) -> dict[str, Any]:
    """One experiment's section: plain values and SVGs for the template, which escapes every text."""
    found = verdicts(content)
    parts, drawn = [], 0
    for ablation, verdict in zip(content["ablations"], found, strict=True):
        figures = _figures(content, ablation, verdict) if drawn < MOST_FIGURES else {"effects": None, "divisions": []}
        drawn += bool(figures["effects"]) + len(figures["divisions"])
        table = table_of(content, ablation, verdict)
        parts.append({"name": verdict.name, "sentence": verdict.sentence, "table": table, "rows": has_rows(table),
                      **figures})  # fmt: skip
    return {
        "plan": plain_text(content["plan"]),
        "discussion": str(content.get("discussion") or "").strip(),
        "lines": headlines(content, found),
        "parts": parts,
        "protocols": protocols_of(content, found),
        "problems": [f"line {problem['line']}: {plain_text(problem['what'])}" for problem in problems_of(content)],
    }


def _figures(content: Content, ablation: Content, verdict: AblationVerdict) -> dict[str, Any]:
    return {"effects": ablation_figure(verdict), "divisions": list(_divisions(content["baseline"], ablation))}


def _divisions(baseline: Content, ablation: Content) -> Iterator[dict[str, Any]]:
    """The divisions of the arms that change it, the baseline's first; each once."""
    shown: list[Mapping[str, Any]] = [baseline["division"]] if baseline.get("division") else []
    for arm in ablation["arms"]:
        division = arm.get("division")
        if shown and arm["status"] == "done" and division and division not in shown:
            if len(shown) == 1:
                yield _picture("baseline", shown[0])
            shown.append(division)
            yield _picture(arm["label"], division)


def _picture(label: str, division: Mapping[str, Any]) -> dict[str, Any]:
    return {"label": plain_text(label), "svg": _drawn_once(compact(division))}


@lru_cache(maxsize=64)
def _drawn_once(division: str) -> bytes:
    """A division's picture; many ablations of a plan have the same."""
    return division_picture(*division_tables(json.loads(division)))
