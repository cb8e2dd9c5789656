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

from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.merge.methods import method
from deme_diffusion.merge.vectors import Weight
from deme_diffusion.models import projection
from deme_diffusion.models.projection import fold_tensor
from deme_diffusion.weights import State, StreamWriter, Weights, check_same_keys

METADATA_KEY = "deme_merge"


class Merger:
    """A base and N experts, opened and checked; `tensor` merges one parameter at a time."""

    def __init__(self, base: Path, experts: Sequence[Path], name: str = "task_arithmetic") -> None:
        self.method, self._stack = method(name), ExitStack()
        self.base = self._stack.enter_context(Weights(base))
        self.experts = [self._stack.enter_context(Weights(folder)) for folder in experts]
        for expert in self.experts:
            check_same_keys(self.base, expert)
        self.matrices = [projection.load(folder) for folder in experts]

    def __enter__(self) -> Merger:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def check(self, weights: Sequence[float]) -> list[float]:
        """The weights, one an expert. Raises UserError otherwise."""
        if len(weights) != len(self.experts):
            raise UserError(f"weights: {len(weights)} given for {len(self.experts)} experts")
        return [float(w) for w in weights]

    def merged_matrix(self, place: str, weights: Sequence[float]) -> torch.Tensor | None:
        """sum_i w_i D_i at one place; None where no expert with a weight has a projection."""
        terms = [w * matrices[place].float() for w, matrices in zip(weights, self.matrices, strict=True)
                 if w and place in matrices]  # fmt: skip
        return torch.stack(terms).sum(0) if terms else None

    def tensor(self, key: str, weights: Sequence[float]) -> torch.Tensor:
        """One merged and folded parameter, in the base's dtype. Raises UserError when it is not finite."""
        base = self.base.tensor(key)
        merged = self.method.merge(
            Weight(base), [Weight(expert.tensor(key)) for expert in self.experts], list(weights)
        ).value
        matrix = self.merged_matrix(key.rpartition(".")[0], weights)
        if matrix is not None:
            merged = fold_tensor(merged, matrix)
        if not torch.isfinite(merged).all():
            raise UserError(
                f"{key}: the merged tensor is not finite; look for NaN in the experts, or lower the weights"
            )
        return merged.to(base.dtype)

    def state(self, weights: Sequence[float]) -> State:
        """The whole merged model in memory: what a search evaluates."""
        weights = self.check(weights)
        return {key: self.tensor(key, weights) for key in self.base.keys()}  # noqa: SIM118


def write_merged(
    merger: Merger, weights: Sequence[float], out: Path, *, recipe: Mapping[str, Any] | None = None
) -> None:
    """Stream the merged component into the folder `out`, sharded like the base, its recipe in the files' metadata."""
    weights = merger.check(weights)
    out.mkdir(parents=True, exist_ok=True)
    metadata = {METADATA_KEY: json.dumps({"weights": weights, **(recipe or {})}, sort_keys=True)}
    for name, keys in merger.base.layout().items():
        header = {key: (merger.base.tensor(key).dtype, merger.base.shape(key)) for key in keys}
        writer = StreamWriter(out / name, header, metadata)
        for key in keys:
            try:
                writer.write(key, merger.tensor(key, weights))
            except OSError as error:
                raise MachineError(f"{out / name}: cannot be written: {error.strerror}") from None
        writer.close()
    for file in merger.base.path.glob("*.json"):
        shutil.copy(file, out / file.name)


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
    for part in pipeline.iterdir():
        if part.name == component or part.name.startswith("."):
            continue
        if part.is_dir():
            shutil.copytree(part, out / part.name, dirs_exist_ok=True)
        elif part.suffix == ".json":
            shutil.copy(part, out / part.name)
    write_merged(merger, weights, out / component, recipe=recipe)
