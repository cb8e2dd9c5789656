"""The processes that `accelerate launch` or `torchrun` started together: how many, which one this is. No torch.

Every one runs the same command; only the main process locks, decides, writes and speaks.
"""

from __future__ import annotations

import os

# As accelerate reads them: torchrun's names, then those of MPI launchers.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


def count() -> int:
    """Processes of this launch; 1 where there was none."""
    return max(1, _first(_SIZES, 1))


def rank() -> int:
    """Which one this is, from 0."""
    return _first(_RANKS, 0) if count() > 1 else 0


def is_main() -> bool:
    """Whether this one locks, decides, writes and speaks."""
    return rank() == 0


def on_this_machine() -> int:
    """Processes of this launch that share this machine's cores and memory."""
    return max(1, _first(_LOCAL_SIZES, 1)) if count() > 1 else 1


def _first(names: tuple[str, ...], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), otherwise)
