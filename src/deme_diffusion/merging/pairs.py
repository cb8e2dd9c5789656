"""Two experts as stock pipelines serve them: `transformer` from `boundary_ratio` T on, `transformer_2` below. No torch.

Such a pair is a division into two ranges: expert 0, of little noise, is `transformer_2`, and expert 1 `transformer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme_diffusion.division import Division
from deme_diffusion.errors import UserError, nearest
from deme_diffusion.files import part_of
from deme_diffusion.merging.checkpoints import MODEL_INDEX
from deme_diffusion.schedule import flow_edges, flow_sigmas
from deme_diffusion.weight_files import read_json

LOW, HIGH, BOUNDARY = "transformer_2", "transformer", "boundary_ratio"
FAMILIES = ("wan",)
"""Whose stock pipeline takes a pair."""


def boundary_ratio(division: Division, scheduler: Mapping[str, Any], *, where: str = "scheduler") -> float:
    """The ratio by which a stock pipeline routes exactly as a division into two ranges does.

    The pipeline compares t >= ratio T in float32, in which the first timestep of the upper range is exact. Raises
    UserError where the division is no two contiguous ranges of ascending noise.
    """
    served = [division.served(i) for i in range(division.num_experts)]
    if len(served) != 2 or any(len(runs) != 1 for runs in served) or served[0][0][0] != 0:
        said = " and ".join("+".join(f"[{low},{high})" for low, high in runs) for runs in served[:3])
        raise UserError(
            f"the division serves {said}{' and more' if len(served) > 3 else ''}: a pair is two contiguous ranges, the "
            "first from 0 on; use decouple.num_ranges=2 with division=uniform, log_snr or explicit"
        )
    edges = flow_edges(flow_sigmas(scheduler, where=where))
    return float(edges[served[1][0][0]]) / division.num_timesteps


def check_family(family: str) -> None:
    """Raises UserError for a family without a stock pipeline that takes a pair."""
    if family not in FAMILIES:
        raise UserError(
            f"model.family={family}: no stock pipeline of it takes a pair of experts, as {', '.join(FAMILIES)}'s do "
            f"with {LOW} and {BOUNDARY}; merge the experts into one model"
        )


def experts_of(pair: Path, base: Path) -> tuple[Path, Path]:
    """The components of a stock pair, as experts in the order of noise. Raises UserError where `pair` is none.

    The base, which both were finetuned from, is a pipeline of one transformer.
    """
    if not pair.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(pair)) and not pair.parent.exists():
        raise UserError(f"pair {pair}: no such folder; of a hub model, first: hf download {pair} --local-dir FOLDER")
    if not pair.is_dir():
        siblings = pair.parent.iterdir() if pair.parent.is_dir() else ()
        raise UserError(f"pair {pair}: no such folder{nearest(pair.name, [path.name for path in siblings])}")
    if is_pair(base):
        raise UserError(f"base {base}: a pair of experts itself; name the one model that both were finetuned from")
    if not (pair / MODEL_INDEX).is_file():
        raise UserError(f"pair {pair}: no {MODEL_INDEX}; a pipeline with {HIGH} and {LOW} is expected")
    if not is_pair(pair):
        raise UserError(f"pair {pair}: {MODEL_INDEX} names no {BOUNDARY}; it is one model, so give it as --expert")
    ratio = read_json(pair / MODEL_INDEX)[BOUNDARY]
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(f"pair {pair}: {BOUNDARY} is {ratio!r}; a number between 0 and 1 is expected")
    for name in (LOW, HIGH):
        if not (part_of(pair, name) / "config.json").is_file():
            raise UserError(f"pair {pair}: no {name}/config.json; a pair holds both {HIGH} and {LOW}")
    return part_of(pair, LOW), part_of(pair, HIGH)


def is_pair(pipeline: Path) -> bool:
    """Whether a folder is a pipeline that says where its two experts change."""
    return (pipeline / MODEL_INDEX).is_file() and read_json(pipeline / MODEL_INDEX).get(BOUNDARY) is not None
