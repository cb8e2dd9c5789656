"""The Fisher information of a recipe's experts, for merges outside it."""

from __future__ import annotations

from deme_diffusion.cli import show
from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, DryRun, Jobs, Out, Overrides, RecipeArgument, opened


@app.command()
def fisher(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make the Fisher information of every expert, on its own timesteps, as `deme merge --fisher` takes it.

    Prints the files in the order of the experts. A recipe with merge.method=fisher makes them by itself.
    """
    whole = opened(recipe, overrides, out, jobs, dry_run=dry_run)
    if dry_run:
        show.plan(whole, whole.graph.fishers(), as_json)
        return
    targets = whole.execute(lambda graph: graph.fishers())
    from deme_diffusion.evaluation.fisher import FILE

    files = [{"label": n.label, "file": str(whole.store.folder(n.key) / FILE)} for n in targets]
    if as_json:
        show.as_json(files)
        return
    show.say(*(f"{entry['label']:<32} {entry['file']}" for entry in files))
