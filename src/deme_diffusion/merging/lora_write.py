"""A merged LoRA on disk: the file that stock diffusers loads, its record, and what a reader must know of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.errors import UserError
from deme_diffusion.files import Record, explained
from deme_diffusion.lora import Factors, save_lora
from deme_diffusion.lora_files import LORA_NAME
from deme_diffusion.merging import record
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.lora import MergedLora, loras_of, merged_lora
from deme_diffusion.merging.lora_weights import record_of
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.statistics import Statistics
from deme_diffusion.merging.vectors import finite
from deme_diffusion.merging.write import METADATA_KEY

log = logging.getLogger(__name__)


def write_lora(
    merger: Merger,
    weights: MergeWeights,
    folder: Path,
    *,
    source: str,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    recipe: Mapping[str, Any] | None = None,
    score: Mapping[str, Any] | None = None,
    full_hash: bool = False,
) -> Record:
    """Merge a merger's LoRAs into `pytorch_lora_weights.safetensors` of a folder, and return the record, not written.

    Its error, where a rank was lowered, is in the record and the log.
    """
    component = loras_of(merger)[0].lora.component
    seen = Statistics(len(merger.experts), _entries(merger))
    merged = merged_lora(merger, weights, rank, seen)
    layers = _in(merged, dtype)
    told = {"weights": weights.as_dict(), "method": merger.row.name, **(recipe or {})}
    with explained("write", folder):
        save_lora(
            folder / LORA_NAME,
            component,
            layers,
            record_of(merger.base, full_hash=full_hash),
            **{METADATA_KEY: json.dumps(told, sort_keys=True)},
        )
    kept = record.record(
        merger,
        weights,
        source=source,
        shards=[LORA_NAME],
        dtype=dtype,
        statistics=seen,
        score=score,
        full_hash=full_hash,
    )
    own = _about(merged)
    if not own["exact"]:
        log.warning("%s", said(own))
    return {**kept, "dtype": str(dtype or torch.float32).removeprefix("torch."), "lora": own}


def said(own: Mapping[str, Any]) -> str:
    """What a merge cut off, in a line."""
    return (
        f"rank {own['rank']}: relative Frobenius error {own['relative_error']:.3g} of the merged change "
        f"({own['worst_error']:.3g} in {own['worst_layer']}); a higher rank loses less"
    )


def readme(told: Mapping[str, Any], base: str) -> str:
    """README.md of a merged LoRA, from its record: what it is, what was lost, how stock diffusers loads it."""
    own, weights = told["lora"], ", ".join(f"{w:g}" for w in told["weights"]["values"])
    exact = (
        "The merge is exact: the factors stand side by side, and their ranks add up, to a layer's full rank at most."
    )
    lost = f"It is a decomposition of the merged change; {said(own)}."
    return (
        f"# A merged LoRA\n\n{len(told['experts'])} LoRAs for `{base}`, merged by {told['method']} with weights "
        f"{weights}: {own['layers']} layers, rank {own['rank']}. {exact if own['exact'] else lost} `merge.json` says "
        f"more.\n\n```python\nfrom diffusers import DiffusionPipeline\n\npipeline = "
        f'DiffusionPipeline.from_pretrained({base!r})\npipeline.load_lora_weights("path/to/this/folder")\n```\n'
    )


def _about(merged: MergedLora) -> Record:
    worst, error = merged.worst
    return {
        "layers": len(merged.layers),
        "rank": merged.rank,
        "exact": merged.exact,
        "relative_error": merged.relative_error,
        "worst_layer": worst,
        "worst_error": error,
        "parameters": sum(own.down.numel() + own.up.numel() for own in merged.layers.values()),
    }


def _entries(merger: Merger) -> int:
    names = {name for reader in loras_of(merger) for name in reader.lora.layers}
    return sum(prod(merger.base.shape(f"{name}.weight")) for name in names)


def _in(merged: MergedLora, dtype: torch.dtype | None) -> dict[str, Factors]:
    """The factors in the dtype in which they are written. Raises UserError where one overflows."""
    if dtype is None:
        return merged.layers
    found = {name: Factors(own.down.to(dtype), own.up.to(dtype), own.scale) for name, own in merged.layers.items()}
    for name, own in found.items():
        if not (finite(own.down) and finite(own.up)):
            raise UserError(f"{name}: the merged factors are too large for {str(dtype).removeprefix('torch.')}")
    return found
