"""Sub-commands around runs: what ships, a run's page again, cleaning up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, opened
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
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: AsJson = False
) -> None:
    """Write the table and page of a finished run again, or, of RUN/ablations/PLAN, those of an experiment."""
    from deme_diffusion.pipeline.run import ABLATIONS, RECORD, is_experiment

    if (run_folder / RECORD).is_file() or is_experiment(run_folder):
        from deme_diffusion.cli.ablate import say_again

        say_again(run_folder, as_json)
        return
    run = opened(str(run_folder), None, None, dry_run=True)
    unfinished = [node.label for node in run.graph.nodes if run.store.status(node.key) != "done"]
    if unfinished:
        count, first = len(unfinished), unfinished[0]
        said = f"{count} stages are not done ({first}, ...)" if count > 1 else f"a stage is not done ({first})"
        found = [str(file.parent) for file in sorted(run_folder.glob(f"{ABLATIONS}/*/{RECORD}"))]
        more = f"; of its ablations: deme report {found[0]}" if found else ""
        raise UserError(f"{run_folder}: {said}; first: deme run {run_folder}{more}")
    run.stages = run.recorded()
    show.table(run, as_json)


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go.")] = False,
    runs: Annotated[Path, typer.Option(help="The folder that holds runs and store.")] = Path("runs"),
) -> None:
    """Remove stages that no run refers to."""
    from deme_diffusion.artefacts import Store, referenced
    from deme_diffusion.artefacts import clean as clean_store

    if not runs.is_dir():
        raise UserError(f"{runs}: no such folder")
    removed = clean_store(Store(runs / "store"), referenced(runs), dry_run)
    for path, size in removed:
        show.say(f"{'would remove' if dry_run else 'removed'} {path} ({size / 1e6:.1f} MB)")
    show.say(f"{len(removed)} stages, {sum(size for _, size in removed) / 1e6:.1f} MB")
