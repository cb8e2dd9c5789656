"""Decouple-then-Merge: finetune a diffusion model as experts on timestep ranges, merge them into one of equal cost.

`run` is the whole method from Python; `decouple`, `merge`, `evaluate` and `sample` are its parts, and `analyze` draws
the paper's figures; `merge_checkpoints` merges any checkpoints without a recipe. The command `deme` does the same,
stage by stage.
"""

from __future__ import annotations

from deme_diffusion.api import (
    analyze,
    attach_projection,
    decouple,
    evaluate,
    merge,
    merge_checkpoints,
    run,
    sample,
)
from deme_diffusion.results import Expert, Figure, Merged, MergedCheckpoint, Result

__version__ = "0.1.0"
__all__ = [
    "Expert",
    "Figure",
    "Merged",
    "MergedCheckpoint",
    "Result",
    "analyze",
    "attach_projection",
    "decouple",
    "evaluate",
    "merge",
    "merge_checkpoints",
    "run",
    "sample",
]
