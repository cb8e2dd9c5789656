"""`deme pair`: the experts of a division into two ranges as one stock pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, Overrides, RecipeArgument, opened

_HELP = """Put the two experts of a run into one pipeline that stock diffusers loads and routes.

Of a recipe with decouple.num_ranges=2 whose experts are trained, for families whose pipelines take transformer,
transformer_2 and boundary_ratio (Wan). The way back, two experts of such a pipeline into one model:

\b
  deme merge --base BASE --pair PAIR --out merged
"""


@app.command(help=_HELP)
def pair(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The new folder of the pair.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put the two experts of a run into one pipeline that stock diffusers loads and routes."""
    from deme_diffusion.errors import UserError
    from deme_diffusion.pipeline.pairing import export_pair

    if out is None:
        raise UserError("deme pair without --out: say where the pair goes, as --out pair")
    made = export_pair(opened(recipe, overrides, None, dry_run=True, beside=True), out)
    if as_json:
        show.as_json({"folder": str(made.folder), **made.record, "linked": made.linked})
        return
    show.say(made.folder)
    edge, sigma = made.record["first_timestep_of_transformer"], made.record["first_sigma_of_transformer"]
    ratio = f"boundary_ratio={made.boundary_ratio:.6g}"
    show.say(f"transformer from t = {edge} (sigma {sigma:.4g}) on, transformer_2 below: {ratio}")
    if made.linked:
        show.say("weight files are hard links: replace them, never edit them in place")
