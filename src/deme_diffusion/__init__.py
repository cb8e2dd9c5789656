"""Decouple-then-Merge: finetune a diffusion model as experts on timestep ranges, merge them into one of equal cost.

`run` is the whole method from Python; the command `deme` does the same, stage by stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deme_diffusion.report.tables import Row
    from deme_diffusion.report.verdict import Verdict

__version__ = "0.1.0"
__all__ = ["Result", "run"]


@dataclass(frozen=True)
class Result:
    """What a run leaves: its folder, the merged pipeline's folder, the evidence.

    With several seeds `merged` is the first one's; with merge.method=none it is None.
    """

    folder: Path
    merged: Path | None
    table: list[Row]
    verdict: Verdict


def run(recipe: str, *overrides: str, out: str | Path | None = None) -> Result:
    """Run a recipe (packaged name, YAML path or run folder) with KEY=VALUE overrides; run again to resume.

    Recipes with `runtime.jobs` above 1 start processes, so a script needs the usual `if __name__ == "__main__"`.
    Raises UserError for wrong input, MachineError when the machine fails, Interrupted after a signal.
    """
    from deme_diffusion.pipeline.run import open_run
    from deme_diffusion.recipes import load

    opened = open_run(load(recipe, overrides), out=None if out is None else Path(out))
    opened.execute()
    table, verdict = opened.report()
    return Result(opened.folder, opened.merged if opened.merged.exists() else None, table, verdict)
