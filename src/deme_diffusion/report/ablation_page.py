"""What the page shows of an ablation experiment: verdicts, tables, effects, and the divisions that arms try."""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from deme_diffusion.report.ablation_effects import Content, plain_text
from deme_diffusion.report.ablation_sentences import AblationVerdict, verdicts
from deme_diffusion.report.ablation_tables import has_rows, protocols_of, table_of
from deme_diffusion.report.ablation_text import headlines, problems_of
from deme_diffusion.report.album import Album
from deme_diffusion.report.cells import compact

MOST_FIGURES = 40
"""Effects and divisions that one experiment's section draws; the tables are all there."""


def ablation_page(content: Content) -> dict[str, Any]:
    """The page of an experiment alone, as what `page.render_page` takes."""
    page = {"title": f"{plain_text(content['plan'])} · ablations of {plain_text(content['recipe'])}"}
    kept = {"command": content.get("command"), "provenance": content.get("provenance")}
    return {**page, **{key: value for key, value in kept.items() if value}, "ablations": [content]}


def ablation_section(content: Content, album: Album, anchor: str = "ablations") -> dict[str, Any]:
    """One experiment's section: plain values and images for the template, which escapes every text."""
    found = verdicts(content)
    parts, drawn = [], 0
    for ablation, verdict in zip(content["ablations"], found, strict=True):
        none: dict[str, Any] = {"effects": None, "divisions": []}
        figures = _figures(content, ablation, verdict, album) if drawn < MOST_FIGURES else none
        drawn += bool(figures["effects"]) + len(figures["divisions"])
        table = table_of(content, ablation, verdict)
        parts.append({"name": verdict.name, "sentence": verdict.sentence, "table": table, "rows": has_rows(table),
                      **figures})  # fmt: skip
    return {
        "id": anchor,
        "plan": plain_text(content["plan"]),
        "discussion": str(content.get("discussion") or "").strip(),
        "lines": headlines(content, found),
        "parts": parts,
        "protocols": protocols_of(content, found),
        "problems": [f"line {problem['line']}: {plain_text(problem['what'])}" for problem in problems_of(content)],
    }


def _figures(content: Content, ablation: Content, verdict: AblationVerdict, album: Album) -> dict[str, Any]:
    from deme_diffusion.report.ablation_figure import ablation_figure

    effects = ablation_figure(verdict)
    divisions = [{"label": label, "image": album.svg(svg)} for label, svg in _divisions(content["baseline"], ablation)]
    return {"effects": album.svg(effects) if effects else None, "divisions": divisions}


def _divisions(baseline: Content, ablation: Content) -> Iterator[tuple[str, bytes]]:
    """The divisions of the arms that change it, the baseline's first; each once."""
    shown: list[Mapping[str, Any]] = [baseline["division"]] if baseline.get("division") else []
    for arm in ablation["arms"]:
        division = arm.get("division")
        if shown and arm["status"] == "done" and division and division not in shown:
            if len(shown) == 1:
                yield _picture("baseline", shown[0])
            shown.append(division)
            yield _picture(arm["label"], division)


def _picture(label: str, division: Mapping[str, Any]) -> tuple[str, bytes]:
    return plain_text(label), _drawn_once(compact(division))


@lru_cache(maxsize=64)
def _drawn_once(division: str) -> bytes:
    """A division's picture; many ablations of a plan have the same."""
    from deme_diffusion.report import figures

    return figures.division_picture(*figures.division_tables(json.loads(division)))
