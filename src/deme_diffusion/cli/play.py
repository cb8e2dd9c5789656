"""The playground of a run: sliders for its merge weights on a local page."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import Out, Overrides, RecipeArgument, opened

MOST_IMAGES = 256


@app.command()
def play(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Who may reach the page: this machine, or 0.0.0.0: who has the address.")
    ] = "127.0.0.1",
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    images: Annotated[int, typer.Option(min=1, max=MOST_IMAGES, help="Images beside each other at first.")] = 16,
    out: Out = None,
) -> None:
    """Open a local page to merge a run's experts by hand: sliders, samples beside the base's, save as model."""
    from deme_diffusion.playground.serving import check_installed
    from deme_diffusion.playground.serving import play as serve

    check_installed()
    run = opened(recipe, overrides, out, dry_run=True, beside=True)
    words = ["deme", "run", recipe, *(overrides or [])]

    def say(address: str) -> None:
        show.say(address)
        sys.stdout.flush()

    serve(run, host=host, port=port, images=images, words=words, out=out, open_browser=open_browser, say=say)
