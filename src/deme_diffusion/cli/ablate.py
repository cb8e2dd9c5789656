"""`deme ablate`: a plan's ablations carried out on a recipe, or what that would be."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, DryRun, Jobs, Out, Overrides
from deme_diffusion.errors import UserError

if TYPE_CHECKING:
    from deme_diffusion.ablate.experiment import Experiment
    from deme_diffusion.ablate.running import Findings

_STRICT = "Refuse a plan with entries that cannot be read, or arms that cannot be run or equal the baseline."


@app.command()
def ablate(
    plan: Annotated[str | None, typer.Argument(help="A plan's document, or the name of a packaged one.")] = None,
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="The baseline: name of a packaged recipe, a YAML path, or a run folder.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Train every arm with the seeds 0 to K - 1.")] = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    strict: Annotated[bool, typer.Option("--strict", help=_STRICT)] = False,
    max_arms: Annotated[int | None, typer.Option(min=1, help="Run more than 500 arms, up to so many.")] = None,
    parts: Annotated[bool, typer.Option("--parts", help="List the parts that can be ablated and stop.")] = False,
) -> None:
    """Carry out an ablation plan on a recipe: every arm with one change, what they share made once, a verdict each."""
    if parts:
        _list_parts(as_json)
        return
    from deme_diffusion.ablate.opening import check
    from deme_diffusion.ablate.running import MOST_NAME, carried_out, is_file, opened_plan
    from deme_diffusion.report.ablation_effects import plain_text

    if plan is None or ("=" in plan and not is_file(plan)):
        raise UserError("deme ablate: no plan; deme ablate PLAN --recipe RECIPE, PLAN a document, or baselines")
    if recipe is None:
        raise UserError(f"deme ablate {plain_text(plan, MOST_NAME)}: no baseline; add --recipe RECIPE")
    changes = [*(overrides or []), *([f"runtime.jobs={jobs}"] if jobs else [])]
    command = shlex.join(["deme", *sys.argv[1:]])
    opened = opened_plan(plan, recipe, changes, seeds=seeds, out=out, command=command, download=not dry_run)
    check(opened, strict=strict, max_arms=max_arms, dry=dry_run)
    if dry_run:
        _say_plan(opened, as_json)
        return
    found = carried_out(opened)
    _say_findings(found, as_json)
    if found.failed:
        raise typer.Exit(1)


def _list_parts(as_json: bool) -> None:
    from deme_diffusion.ablate.parts import listing

    rows = list(listing())
    if as_json:
        show.as_json(rows)
        return
    for row in rows:
        told = [f"  {name}: {value}" for name, value in row.items() if value and name not in ("part", "description")]
        show.say(f"{row['part']}: {row['description']}", *told)


def _say_plan(opened: Experiment, as_json: bool) -> None:
    from deme_diffusion.ablate.outcome import planned

    if as_json:
        show.as_json(planned(opened))
        return
    from deme_diffusion.ablate.told import equal_lines, metric_lines, needs_lines, problem_lines, tables

    show.tables(tables(opened))
    show.say(*metric_lines(opened), *equal_lines(opened.plan), *problem_lines(opened), *needs_lines(opened))


def say_again(folder: Path, as_json: bool) -> None:
    """Write an experiment's tables, figures and page again from its record, and print them; nothing is computed."""
    from deme_diffusion.ablate.running import Findings
    from deme_diffusion.pipeline.run import RECORD, RUN
    from deme_diffusion.report.ablation import write_ablation
    from deme_diffusion.report.ablation_record import check_record
    from deme_diffusion.weight_files import read_json

    if not (folder / RECORD).is_file():
        raise UserError(f"{folder}: not finished, so there is no {RECORD}; first: {read_json(folder / RUN)['command']}")
    content = read_json(folder / RECORD)
    try:
        check_record(content)
    except UserError as error:
        raise UserError(f"{folder / RECORD}: {error}") from None
    _say_findings(Findings(folder, content, tuple(write_ablation(folder, content))), as_json)


def _say_findings(found: Findings, as_json: bool) -> None:
    if as_json:
        show.as_json(found.content)
        return
    from deme_diffusion.ablate.told import made_lines
    from deme_diffusion.report.ablation import rich_tables, together, verdicts

    show.tables(rich_tables(found.content))
    many = together(verdicts(found.content))
    show.say(*found.sentences, *([many] if many else []), *made_lines(found.content))
    page = Path(found.folder) / "report.html"
    show.say(page if page.exists() else found.folder)
