"""The paper's figures for a run, or for any models: computed where they are not, and drawn; or drawn from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, DryRun, Jobs, Overrides, opened
from deme_diffusion.config import FIGURES
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.processes import is_main

DATA = ".npz"


@app.command()
def analyze(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="Name of a packaged recipe, a YAML path, a run folder, or .npz files of figures to draw again.",
        ),
    ],
    overrides: Overrides = None,
    figure: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this one, of {', '.join(FIGURES)}; may be repeated.  [analyze.figures, or all]"),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="An expert trained elsewhere, one for each range in their order."),
    ] = None,
    merged: Annotated[str | None, typer.Option(metavar="DIR", help="A model merged elsewhere.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder, or where pictures of .npz files go.  [runs/RECIPE, or the current folder]"),
    ] = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Draw the paper's figures, computing what is not there: data as .npz, pictures as PNG and SVG."""
    if recipe.endswith(DATA):
        needless = {"--figure": figure, "--expert": expert, "--merged": merged, "--jobs": jobs, "--dry-run": dry_run}
        _draw_files([recipe, *(overrides or [])], [name for name, value in needless.items() if value], out, as_json)
        return
    from deme_diffusion.pipeline.figures import named, overrides_for

    run = opened(recipe, [*(overrides or []), *overrides_for(expert, merged)], out, jobs, dry_run=dry_run)
    names = named(figure, run.recipe)
    if dry_run:
        show.plan(run, [node for name in names for node in run.graph.figure(name)], as_json)
        return
    run.analyze(names)
    if is_main():
        drawn = run.draw(names)
        run.renew()
        _show(drawn, run.folder, as_json)
        if run.failure is not None:
            raise run.failure
        if missing := [name for name in names if name not in {picture["kind"] for picture in drawn}]:
            raise MachineError(f"not drawn: {', '.join(missing)}; their data are in {run.store.root}")


def _draw_files(files: Sequence[str], needless: Sequence[str], out: Path | None, as_json: bool) -> None:
    if needless:
        raise UserError(f"{needless[0]}: says nothing of .npz files, which are drawn as they are")
    if other := next((file for file in files if not file.endswith(DATA)), None):
        raise UserError(f"{other}: no {DATA} file; give files of figures, or a recipe and its settings")
    from deme_diffusion.report.drawing.gallery import draw_files

    folder = out or Path()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: a file, where pictures need a folder")
    _show(draw_files([Path(file) for file in files], folder), folder, as_json)


def _show(drawn: Sequence[dict[str, Any]], folder: Path, as_json: bool) -> None:
    """Title and caption of each picture, and where it lies."""
    pictures = [{**picture, **{kind: str(folder / picture[kind]) for kind in ("svg", "png")}} for picture in drawn]
    if as_json:
        show.as_json([{**picture, "data": [str(folder / file) for file in picture["data"]]} for picture in pictures])
        return
    for picture in pictures:
        show.say(f"{picture['title']}: {picture['caption']}", f"  {picture['svg']}", f"  {picture['png']}")
