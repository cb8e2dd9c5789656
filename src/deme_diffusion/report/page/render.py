"""The page of a run as text, from `run.json`'s content: which sections it has, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deme_diffusion.files import write_text
from deme_diffusion.report.ablation_page import ablation_section
from deme_diffusion.report.album import MOST_BYTES, Album
from deme_diffusion.report.card import DEMONSTRATION, loading_lines, method_said, needs
from deme_diffusion.report.cells import Row
from deme_diffusion.report.glossary import BEST, words_of
from deme_diffusion.report.page import merging, pictures
from deme_diffusion.report.page.environment import environment
from deme_diffusion.report.page.losses import losses_section
from deme_diffusion.report.page.results import table_section, verdict_section
from deme_diffusion.report.page.stages import provenance_section, stages_section
from deme_diffusion.report.page.story import story
from deme_diffusion.report.tables import check_protocols
from deme_diffusion.report.verdict import verdict
from deme_diffusion.report.words import seeds_said, weights_said

PRINTED = ("description", "command", "rerun", "recipe_yaml", "written", "base_model", "cost_machine", "demonstration")
"""What the templates take as it is."""
Section = dict[str, str]


def write_page(run_folder: Path, run: Mapping[str, Any], *, refresh: int | None = None) -> Path:
    """Write report.html into the run folder, atomically; grids and figures are read relative to that folder."""
    path = run_folder / "report.html"
    write_text(path, render_page(run, run_folder, refresh=refresh))
    return path


def render_page(
    run: Mapping[str, Any], folder: Path = Path(), *, refresh: int | None = None, most_bytes: int = MOST_BYTES
) -> str:
    """The page as text; `run` is run.json, a section whose key is missing is left out.

    With `refresh` it loads itself again after so many seconds, and begins with how far the stages are.
    """
    album = Album()
    values = _values(run, folder, album, refresh)
    template = environment().get_template("page.html")
    sections = list(_sections(values))
    return album.fit(lambda: template.render(**values, sections=sections, shortened=album.shortened), most_bytes)


def _values(run: Mapping[str, Any], folder: Path, album: Album, refresh: int | None) -> dict[str, Any]:
    rows: list[Row] = run.get("table") or []
    check_protocols(rows)
    stages, losses = stages_section(run), losses_section(rows, album)
    return {
        "run": {**dict.fromkeys(PRINTED), **run},
        "title": str(run.get("title") or run.get("recipe", "run")),
        "refresh": refresh,
        "demonstration": demonstration_said(run),
        "verdict": None if run.get("unfinished") and not verdict(rows).comparisons else verdict_section(rows),
        "story": [] if run.get("unfinished") else story(run),
        "progress": stages if refresh or run.get("unfinished") else None,
        "seeds": seeds_said(run),
        "table": table_section(rows, losses["metrics"] if losses else ()),
        "grids": pictures.grids_section(run, folder, album),
        "prompts": pictures.prompts_section(run),
        "grids_said": pictures.grids_said(run),
        "words": words_of(run),
        "best": BEST,
        "losses": losses,
        "curves": pictures.curves_section(run, album),
        "weights": merging.weights_section(run, album),
        "search": merging.search_section(run),
        "weights_said": weights_said(run),
        "merge": {"said": method_said(run), **merging.patterns_section(run)},
        "vectors": merging.vectors_section(run),
        "division": merging.division_section(run, album),
        "figures": pictures.figures_section(run, folder, album),
        "ablations": [ablation_section(content, album, f"ablations-{i}")
                      for i, content in enumerate(run.get("ablations") or ())],
        "stages": None if run.get("unfinished") else stages,  # its progress tells them
        "provenance": provenance_section(run.get("provenance") or {}),
        "loading": loading_lines(run) if run.get("merged_path") else "",
        "needs": needs(run),
    }  # fmt: skip


def demonstration_said(run: Mapping[str, Any]) -> str:
    """That its figures prove nothing; '' where that is not so, or the description says so."""
    said = "demonstration" in str(run.get("description")).lower()
    return DEMONSTRATION if run.get("demonstration") and not said else ""


def _sections(values: Mapping[str, Any]) -> Iterator[Section]:
    """The sections that have something to show, in the page's order."""
    run, table = values["run"], values["table"]
    if values["progress"]:
        yield _section("progress", "Progress")
    if table:
        yield _section("table", "Results", "results")
    for name, title in (("grids", "Samples"), ("losses", "Loss by timestep range"), ("curves", "Loss curves")):
        if values[name]:
            yield _section("samples" if name == "grids" else name, title)
    if values["weights"] or values["search"]:
        yield _section("weights", "Merge weights")
    for name, title in (("division", "Division of the timesteps"), ("figures", "Figures")):
        if values[name]:
            yield _section(name, title)
    for plan in values["ablations"]:
        yield {**_section(plan["id"], f"Ablations: {plan['plan']}", "ablations"), "plan": plan}
    if table and table["protocols"]:
        yield _section("protocol", "Protocol")
    if (
        values["loading"]
        or values["stages"]
        or values["provenance"]
        or run["command"]
        or run["rerun"]
        or run["recipe_yaml"]
    ):
        yield _section("provenance", "Use and provenance")


def _section(name: str, title: str, template: str = "") -> dict[str, Any]:
    return {"id": name, "title": title, "template": f"page/{template or name}.html"}
