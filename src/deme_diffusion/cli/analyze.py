"""The paper's figures for a run, or for any model: computed where they are not, and drawn."""

from __future__ import annotations

from typing import Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, DryRun, Jobs, Out, Overrides, RecipeArgument, opened
from deme_diffusion.config import FIGURES
from deme_diffusion.errors import UserError, nearest


@app.command()
def analyze(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    figure: Annotated[
        list[str] | None, typer.Option(help=f"Only this one, of {', '.join(FIGURES)}; may be repeated.")
    ] = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Draw the paper's figures, computing what is not there: data as .npz, pictures as PNG and SVG."""
    for name in figure or ():
        if name not in FIGURES:
            raise UserError(f"--figure {name}: there are {', '.join(FIGURES)}{nearest(name, FIGURES)}")
    names = [name for name in FIGURES if name in (figure or FIGURES)]
    run = opened(recipe, overrides, out, jobs, dry_run=dry_run)
    if dry_run:
        show.plan(run, [node for name in names for node in run.graph.figure(name)], as_json)
        return
    run.execute(lambda graph: [node for name in names for node in graph.figure(name)])
    drawn = run.draw(names)
    if as_json:
        show.as_json(drawn)
        return
    show.say(
        *(
            line
            for picture in drawn
            for line in (f"{picture['title']}: {picture['caption']}", f"  {run.folder / picture['svg']}")
        )
    )
