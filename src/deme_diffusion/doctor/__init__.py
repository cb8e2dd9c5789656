"""Doctor: what would stop or spoil a run, found before any training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from deme_diffusion.doctor.finding import Finding
from deme_diffusion.errors import UserError

if TYPE_CHECKING:
    from deme_diffusion.pipeline.run import Run

__all__ = ["Finding", "examine"]


def examine(open_run: Callable[[], Run] | None) -> Iterator[Finding]:
    """The environment; with a recipe to open also its settings, its images, and the disk and memory that it needs."""
    from deme_diffusion.doctor import data, environment, needs

    yield from environment.findings()
    if open_run is None:
        return
    try:
        run = open_run()
        yield Finding("ok", "recipe", f"{run.recipe.name}, {len(run.graph.nodes)} stages")
        lacking = list(environment.wanted(run.recipe))
        yield from lacking
        yield from data.findings(run)
        if not any(finding.topic == "runtime.device" for finding in lacking):  # else: needs on which device?
            yield from needs.findings(run)
    except UserError as error:
        yield Finding("problem", "recipe", str(error))
