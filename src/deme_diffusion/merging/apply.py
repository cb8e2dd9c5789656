"""The streamed merge of N + 1 checkpoints: tensor by tensor, projections merged and then folded, the recipe inside.

Order matters: D is its own task vector, so the merged P is I + sum_i w_i D_i, folded into the merged K. Folding each
expert first and merging then gives another model (4e-3 relative at deltas of 1e-2).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.merging.methods import method
from deme_diffusion.merging.vectors import Weight, wide
from deme_diffusion.models import projection
from deme_diffusion.models.projection import fold_tensor
from deme_diffusion.weights import WEIGHTS_NAME, State, Weights, check_same_keys, stream_to

METADATA_KEY, MODEL_INDEX = "deme_merge", "model_index.json"


class Merger:
    """A base and N experts, opened and checked; `tensor` merges one parameter at a time."""

    def __init__(self, base: Path, experts: Sequence[Path], name: str = "task_arithmetic") -> None:
        self.method, self._stack = method(name), ExitStack()
        self.base = self._stack.enter_context(Weights(base))
        self.experts = [self._stack.enter_context(Weights(folder)) for folder in experts]
        for expert in self.experts:
            check_same_keys(self.base, expert)
        self.matrices = [self._matrices(folder) for folder in experts]

    def __enter__(self) -> Merger:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _matrices(self, folder: Path) -> State:
        """The projection of one expert, each matrix checked against the operation that it follows."""
        matrices, keys = projection.load(folder), set(self.base.keys())
        for place, matrix in matrices.items():
            if (key := f"{place}.weight") not in keys or tuple(matrix.shape) != (self.base.shape(key)[0],) * 2:
                where = f"{folder / projection.FILE}: {place} {tuple(matrix.shape)}"
                raise UserError(f"{where} follows no operation of {self.base.path}{nearest(place, keys)}")
        return matrices

    def check(self, weights: Sequence[float]) -> list[float]:
        """The weights, one an expert. Raises UserError otherwise."""
        if len(weights) != len(self.experts):
            raise UserError(f"weights: {len(weights)} given for {len(self.experts)} experts")
        return [float(w) for w in weights]

    def merged_matrix(self, place: str, weights: Sequence[float]) -> torch.Tensor | None:
        """sum_i w_i D_i at one place; None where no expert with a weight has a projection."""
        terms = [w * wide(matrices[place]) for w, matrices in zip(weights, self.matrices, strict=True)
                 if w and place in matrices]  # fmt: skip
        return torch.stack(terms).sum(0) if terms else None

    def tensor(self, key: str, weights: Sequence[float]) -> torch.Tensor:
        """One merged and folded parameter, in the base's dtype. Raises UserError when it is not finite."""
        base = self.base.tensor(key)
        if not base.is_floating_point():
            return base  # a buffer of indices or counts, which no task vector can move
        merged = self.method.merge(
            Weight(base), [Weight(expert.tensor(key)) for expert in self.experts], list(weights)
        ).value
        matrix = self.merged_matrix(key.rpartition(".")[0], weights)
        if matrix is not None:
            merged = fold_tensor(merged, matrix)
        result = merged.to(base.dtype)  # before the check: half precision overflows here
        if not torch.isfinite(result.float()).all():
            raise UserError(
                f"{key}: the merged tensor is not finite; look for NaN in the experts, or lower the weights"
            )
        return result

    def state(self, weights: Sequence[float]) -> State:
        """The whole merged model in memory: what a search evaluates."""
        weights = self.check(weights)
        return {key: self.tensor(key, weights) for key in self.base.keys()}  # noqa: SIM118


def write_merged(
    merger: Merger, weights: Sequence[float], out: Path, *, recipe: Mapping[str, Any] | None = None
) -> None:
    """Stream the merged component into the folder `out`, sharded like the base, its recipe in the files' metadata."""
    weights = merger.check(weights)
    metadata = {METADATA_KEY: json.dumps({"weights": weights, **(recipe or {})}, sort_keys=True)}
    for name, keys in merger.base.layout().items():
        header = {key: (merger.base.dtype(key), merger.base.shape(key)) for key in keys}
        with stream_to(out / name, header, metadata) as writer:
            for key in writer.keys:
                writer.write(key, merger.tensor(key, weights))
    for name in ("config.json", f"{WEIGHTS_NAME}.index.json"):
        if (merger.base.path / name).is_file():
            shutil.copy(merger.base.path / name, out / name)


def write_pipeline(
    merger: Merger,
    weights: Sequence[float],
    pipeline: Path,
    component: str,
    out: Path,
    *,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """The base's pipeline folder with its `component` merged: every other part is copied as it is."""
    out.mkdir(parents=True, exist_ok=True)
    for name in _parts(pipeline):
        if name != component and (pipeline / name).is_dir():
            shutil.copytree(pipeline / name, out / name, dirs_exist_ok=True)
        elif (pipeline / f"{name}_config.json").is_file():  # all parts in one folder
            (out / name).mkdir(exist_ok=True)
            shutil.copy(pipeline / f"{name}_config.json", out / name)
    shutil.copy(pipeline / MODEL_INDEX, out / MODEL_INDEX)
    write_merged(merger, weights, out / component, recipe=recipe)


def _parts(pipeline: Path) -> list[str]:
    """Names of the parts that a pipeline's index lists: what else lies in the folder is not the model's."""
    try:
        index = json.loads((pipeline / MODEL_INDEX).read_text())
        return [name for name in index if not name.startswith("_")]
    except (OSError, ValueError):
        raise UserError(f"{pipeline}: no readable {MODEL_INDEX}; a diffusers pipeline folder is expected") from None
