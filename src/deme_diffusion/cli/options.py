"""Arguments and options that several sub-commands take, and how they become an opened run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deme_diffusion.pipeline.run import Run

RecipeArgument = Annotated[str, typer.Argument(help="Name of a packaged recipe, a YAML path, or a run folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as decouple.num_ranges=2.")
]
Out = Annotated[Path | None, typer.Option(help="Run folder; artefacts go into `store` beside it.  [runs/RECIPE]")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Stages to run at once, each in its own process.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run and stop; no network, no torch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def opened(
    recipe: str,
    overrides: Sequence[str] | None,
    out: Path | None,
    jobs: int | None = None,
    *,
    dry_run: bool = False,
    beside: bool = False,
) -> Run:
    """The run that a sub-command speaks of. A dry run never touches the network; `beside` is as of `open_run`."""
    from deme_diffusion.pipeline.run import open_run
    from deme_diffusion.recipes import load

    changes = [*(overrides or []), *([f"runtime.jobs={jobs}"] if jobs else [])]
    command = shlex.join(["deme", *sys.argv[1:]])
    return open_run(load(recipe, changes), out=out, command=command, download=not dry_run, beside=beside)
