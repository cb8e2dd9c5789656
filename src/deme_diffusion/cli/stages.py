"""The whole run, and the sub-commands that make some of its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, DryRun, Jobs, Out, Overrides, RecipeArgument, opened
from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.recipes import load

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
    if whole.failure is not None:  # of a figure: the table stands
        raise whole.failure


def make(run: Run, targets: Callable[[Graph], Sequence[Node]], dry_run: bool, as_json: bool) -> None:
    """Make some stages and what they need, or say what that would be."""
    if dry_run:
        show.plan(run, targets(run.graph), as_json)
        return
    made = run.execute(targets)
    show.made(run, made, as_json)


def one_stage(
    name: str,
    targets: Callable[[Graph], Sequence[Node]],
    recipe: str,
    changes: Sequence[str],
    out: Path | None,
    jobs: int | None,
    dry_run: bool,
    as_json: bool,
    *,
    idle: Callable[[Recipe], str | None] = lambda _: None,
) -> None:
    """What a sub-command does that makes some stages of a recipe; `idle` says why there are none."""
    if why := idle(load(recipe, changes).recipe):  # before anything is fetched
        raise UserError(f"deme {name}: {why}")
    whole = opened(recipe, changes, out, jobs, dry_run=dry_run)
    make(whole, targets, dry_run, as_json)


def _one_stage(
    name: str,
    help_text: str,
    targets: Callable[[Graph], Sequence[Node]],
    *presets: str,
    idle: Callable[[Recipe], str | None] = lambda _: None,
) -> None:
    """Register a sub-command that makes some stages of a recipe and what they need."""

    def command(
        recipe: RecipeArgument,
        overrides: Overrides = None,
        out: Out = None,
        jobs: Jobs = None,
        dry_run: DryRun = False,
        as_json: AsJson = False,
    ) -> None:
        changes = [*presets, *(overrides or [])]
        one_stage(name, targets, recipe, changes, out, jobs, dry_run, as_json, idle=idle)

    app.command(name, help=help_text)(command)


def _no_base(recipe: Recipe) -> str | None:
    given = recipe.model.pretrained
    return None if given is None else f"model.pretrained={given} leaves no base to train; leave it out"


def _no_classifier(recipe: Recipe) -> str | None:
    kind, given = recipe.extractor.kind, recipe.extractor.pretrained
    if kind != "classifier":
        return f"extractor.kind={kind} is never trained; only a classifier is"
    return None if given is None else f"extractor.pretrained={given} leaves no classifier to train; leave it out"


def _no_cache(recipe: Recipe) -> str | None:
    if not recipe.model.latent:
        return f"model.family={recipe.model.family} has no latents to keep; images are read as they are"
    if not recipe.cache.enabled:
        return "cache.enabled=false turns it off; leave it out"
    folder = recipe.cache.folder
    return None if folder is None else f"cache.folder={folder} is there; leave it out to make one"


def _no_clip(recipe: Recipe) -> str | None:
    given = recipe.clip.pretrained
    return None if given is None else f"clip.pretrained={given} leaves no CLIP to train; leave it out"


def no_merge(recipe: Recipe) -> str | None:
    """A control can be merged where the experts are not."""
    merged = recipe.merge.method != "none" or {"soup", "all-timesteps-searched"} & set(recipe.evaluate.controls)
    return None if merged else "merge.method=none leaves nothing to merge; use task_arithmetic"


def merges(graph: Graph) -> Sequence[Node]:
    """The stages of `deme merge RECIPE`."""
    return list(graph.of_stage("merge"))


def _no_search(recipe: Recipe) -> str | None:
    if recipe.merge.search == "none":
        return "merge.search=none leaves no weights to search; use least_squares, grid, gradient, cma_es or tpe"
    return no_merge(recipe)


_one_stage(
    "pretrain",
    "Train the recipe's base from scratch, by its `pretrain` section.",
    lambda graph: list(graph.of_stage("pretrain")),
    "model.pretrained=null",
    idle=_no_base,
)
_one_stage(
    "extractor",
    "Train the classifier that serves as feature extractor.",
    lambda graph: list(graph.of_stage("extractor")),
    "extractor.pretrained=null",
    idle=_no_classifier,
)
_one_stage(
    "cache",
    "Encode images and captions once, for all trainings: latents and text embeddings, by the `cache` section.",
    lambda graph: list(graph.of_stage("cache")),
    idle=_no_cache,
)
_one_stage(
    "clip",
    "Train a small CLIP on the recipe's captions, which takes the CLIP score, by its `clip` section.",
    lambda graph: [graph.trained_clip()],
    "clip.pretrained=null",
    idle=_no_clip,
)
_one_stage(
    "similarity",
    "Compare the base's gradients between timesteps, by the `similarity` section; a division can be made by them.",
    lambda graph: [graph.compared()],
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

    def experts(graph: Graph) -> list[Node]:
        return [e for all_of in graph.experts.values() for i, e in enumerate(all_of) if expert in (None, i)]

    make(whole, experts, dry_run, as_json)


_one_stage("search", "Search the merge weights.", lambda graph: list(graph.of_stage("search")), idle=_no_search)
_one_stage("evaluate", "Measure every model of the table.", lambda graph: [*graph.of_stage("evaluate"), graph.cost])
