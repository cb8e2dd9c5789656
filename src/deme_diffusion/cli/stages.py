"""The whole run, and the sub-commands that make some of its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, DryRun, Jobs, Out, Overrides, RecipeArgument, opened
from deme_diffusion.errors import UserError

if TYPE_CHECKING:
    from deme_diffusion.pipeline.graph import Graph
    from deme_diffusion.pipeline.node import Node
    from deme_diffusion.pipeline.run import Run


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run a whole recipe: experts, merge, table and page. Running it again resumes; what is done costs nothing."""
    whole = opened(recipe, overrides, out, jobs, dry_run=dry_run)
    if dry_run:
        show.plan(whole, None, as_json)
        return
    whole.execute()
    show.table(whole, as_json)


def make(run: Run, targets: Sequence[Node], dry_run: bool, as_json: bool) -> None:
    """Make some stages and what they need, or say what that would be."""
    if dry_run:
        show.plan(run, targets, as_json)
        return
    run.execute(targets)
    show.made(run, targets, as_json)


def _one_stage(name: str, help_text: str, targets: Callable[[Graph], Sequence[Node]], *presets: str) -> None:
    """Register a sub-command that makes some stages of a recipe and what they need."""

    def command(
        recipe: RecipeArgument,
        overrides: Overrides = None,
        out: Out = None,
        jobs: Jobs = None,
        dry_run: DryRun = False,
        as_json: AsJson = False,
    ) -> None:
        whole = opened(recipe, [*presets, *(overrides or [])], out, jobs, dry_run=dry_run)
        make(whole, targets(whole.graph), dry_run, as_json)

    app.command(name, help=help_text)(command)


_one_stage(
    "pretrain",
    "Train the recipe's base from scratch, by its `pretrain` section.",
    lambda graph: list(graph.of_stage("pretrain")),
    "model.pretrained=null",
)
_one_stage(
    "extractor",
    "Train the classifier that serves as feature extractor.",
    lambda graph: list(graph.of_stage("extractor")),
    "extractor.pretrained=null",
)


@app.command()
def decouple(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    expert: Annotated[int | None, typer.Option(min=0, help="Only this expert, counted from 0.")] = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train the experts, all or one."""
    whole = opened(recipe, overrides, out, jobs, dry_run=dry_run)
    count = whole.recipe.decouple.num_ranges
    if expert is not None and expert >= count:
        raise UserError(f"--expert {expert}: the recipe has {count} experts, 0 to {count - 1}")
    experts = [e for all_of in whole.graph.experts.values() for i, e in enumerate(all_of) if expert in (None, i)]
    make(whole, experts, dry_run, as_json)


_one_stage("search", "Search the merge weights.", lambda graph: list(graph.of_stage("search")))
_one_stage("merge", "Merge the experts into one model.", lambda graph: list(graph.of_stage("merge")))
_one_stage("evaluate", "Measure every model of the table.", lambda graph: [*graph.of_stage("evaluate"), graph.cost])
