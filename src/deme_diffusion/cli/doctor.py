"""`deme doctor`: what would stop or spoil a run, before it starts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from deme_diffusion.cli.command import app
from deme_diffusion.cli.options import AsJson, Out, Overrides, opened

MARKS = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe, to check its images and needs as well.")] = None,
    overrides: Overrides = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Check the environment, and a recipe's images, disk and memory. Exit status 2 where there is a problem."""
    from deme_diffusion.doctor import examine

    opening = None if recipe is None else lambda: opened(recipe, overrides, out, dry_run=True)
    found = []
    for finding in examine(opening):
        found.append(finding)
        if not as_json:
            print(f"{MARKS[finding.status]} {finding.topic}: {finding.text}", flush=True)
            for line in finding.details:
                print(f"          {line}")
    if as_json:
        print(json.dumps([vars(finding) for finding in found], indent=2))
    if any(finding.status == "problem" for finding in found):
        raise typer.Exit(2)
