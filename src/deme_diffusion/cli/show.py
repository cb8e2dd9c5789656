"""What sub-commands print: results on stdout, by the main process only."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deme_diffusion.processes import is_main

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from deme_diffusion.pipeline.node import Node
    from deme_diffusion.pipeline.run import Run


def say(*lines: object) -> None:
    """Print a result, a line each."""
    if is_main():
        print(*lines, sep="\n")


def as_json(value: object) -> None:
    """Print a result for machines."""
    say(json.dumps(value, indent=2))


def plan(run: Run, targets: Sequence[Node] | None, in_json: bool) -> None:
    """The dry run: settings, stages (all, or what the targets need) with their state, and what they need."""
    from deme_diffusion.pipeline.estimate import described
    from deme_diffusion.pipeline.estimate import plan as planned_for
    from deme_diffusion.recipes import to_yaml

    only = None if targets is None else {node.digest for node in run.graph.needed(targets)}
    planned = planned_for(run, only)
    if in_json:
        as_json({**planned, "settings": run.recipe.model_dump(mode="json")})
        return
    say(to_yaml(run.recipe))
    for stage in planned["stages"]:
        steps = f"{stage['steps']:>8,} steps" if stage["steps"] else ""
        say(f"{stage['status']:<8} {stage['stage']:<10} {stage['digest']}  {stage['label']:<36} {steps}")
    say(f"run folder: {planned['folder']}", *described(planned))


def console() -> Console:
    """Where tables are printed."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)  # a pipe has no width of its own


def tables(printed: Sequence[RenderableType]) -> None:
    """Print tables, by the main process."""
    for table in printed if is_main() else ():
        console().print(table)


def made(run: Run, targets: Sequence[Node], in_json: bool) -> None:
    """The folders of some stages; of searches and merges, the weights and whose they are."""
    if not is_main():
        return
    from deme_diffusion.pipeline import found

    told = [found.of_stage(run.store, node) for node in targets]
    entries = [
        {"label": n.label, "stage": n.stage, "folder": str(run.store.folder(n.key)), **more}
        for n, more in zip(targets, told, strict=True)
    ]
    if in_json:
        as_json(entries)
        return
    for entry, more in zip(entries, told, strict=True):
        say(f"{entry['label']:<32} {entry['folder']}", *([f"  {found.line_of(more)}"] if more else []))


def table(run: Run, in_json: bool) -> None:
    """The table, what was found, and where the model and the page lie."""
    if not is_main():
        return
    rows, said = run.report()
    if in_json:
        as_json(rows)
        return
    from deme_diffusion.report.tables import rich_table

    printed = console()
    printed.print(rich_table(rows, width=printed.width))
    say(*run.weights_found(rows), said.sentence)
    for path in (run.merged, run.folder / "report.html"):
        if path.exists():
            say(path)
