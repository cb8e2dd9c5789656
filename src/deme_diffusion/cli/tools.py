"""Sub-commands around runs: what ships, cleaning up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson
from deme_diffusion.errors import UserError


@app.command()
def recipes(
    as_json: AsJson = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """List the recipes that ship, a line each."""
    from deme_diffusion.recipes import packaged

    if schema:
        from deme_diffusion.recipes.schema import schema as schema_of_recipes

        show.as_json(schema_of_recipes())
        return
    shipped = packaged()
    if as_json:
        show.as_json(shipped)
        return
    for name, description in shipped.items():
        show.say(f"{name:<16} {description}")


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go.")] = False,
    runs: Annotated[Path, typer.Option(help="The folder that holds runs and store.")] = Path("runs"),
) -> None:
    """Remove stages that no run refers to."""
    from deme_diffusion.artefacts import Store
    from deme_diffusion.clean_up import clean as clean_store
    from deme_diffusion.clean_up import referenced

    if not runs.is_dir():
        raise UserError(f"{runs}: no such folder")
    removed = clean_store(Store(runs / "store"), referenced(runs), dry_run)
    for path, size in removed:
        show.say(f"{'would remove' if dry_run else 'removed'} {path} ({size / 1e6:.1f} MB)")
    show.say(f"{len(removed)} stages, {sum(size for _, size in removed) / 1e6:.1f} MB")
