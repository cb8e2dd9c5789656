"""The streamed merge of N + 1 checkpoints: tensor by tensor, projections merged and then folded, the recipe inside.

Order matters: D is its own task vector, so the merged P is I + sum_i w_i D_i, folded into the merged K. Folding each
expert first and merging then gives another model (4e-3 relative at deltas of 1e-2). Where P folds into no weight the
merged D stays: `projection.safetensors` beside the merged weights, which stock diffusers does not read.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deme_diffusion.errors import UserError
from deme_diffusion.merging.methods import Parameter, function
from deme_diffusion.merging.vectors import Weight, wide
from deme_diffusion.models import projection
from deme_diffusion.models.placement import is_block, operations
from deme_diffusion.models.projection import fold_tensor
from deme_diffusion.weights import WEIGHTS_NAME, State, Weights, check_same_keys, stream_to

log = logging.getLogger(__name__)
METADATA_KEY, MODEL_INDEX = "deme_merge", "model_index.json"


class Merger:
    """A base and N experts, opened and checked; `tensor` merges one parameter at a time."""

    def __init__(self, base: Path, experts: Sequence[Path], name: str = "task_arithmetic") -> None:
        self.method, self._stack = function(name), ExitStack()
        self.base = self._stack.enter_context(Weights(base))
        self.experts = [self._stack.enter_context(Weights(folder)) for folder in experts]
        for expert in self.experts:
            check_same_keys(self.base, expert)
        projection.refuse_beside(base)
        self.matrices = [projection.load(folder) for folder in experts]
        self._place(experts)

    def __enter__(self) -> Merger:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _place(self, experts: Sequence[Path]) -> None:
        """Which places act on each operation, an operation's own before its block's, and which fold into none."""
        shapes = {key: self.base.shape(key) for key in self.base.keys()}  # noqa: SIM118
        for folder, matrices in zip(experts, self.matrices, strict=True):
            projection.check_fits(matrices, shapes, folder / projection.FILE, str(self.base.path))
        places = {place for matrices in self.matrices for place in matrices}
        self._onto: dict[str, list[str]] = {}
        self._unfolded: list[str] = []
        for place in sorted(places, key=lambda place: (is_block(place), place)):
            onto = operations(place, shapes)
            for operation in onto:
                self._onto.setdefault(operation, []).append(place)
            if not onto:
                self._unfolded.append(place)

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
        experts = [Weight(expert.tensor(key)) for expert in self.experts]
        merged = self.method(Parameter(key, Weight(base), experts, list(weights))).value
        for place in self._onto.get(key.rpartition(".")[0], ()):
            matrix = self.merged_matrix(place, weights)
            merged = merged if matrix is None else fold_tensor(merged, matrix)
        return _finite(key, merged.to(base.dtype))  # the check last: half precision overflows here

    def unfolded(self, weights: Sequence[float]) -> State:
        """Place -> merged D where it folds into no weight: the model's extra module; empty where all of it folds."""
        weights, rest = self.check(weights), {}
        for place in self._unfolded:
            if (matrix := self.merged_matrix(place, weights)) is not None:
                dtype = next(matrices[place].dtype for matrices in self.matrices if place in matrices)
                rest[place] = _finite(f"{projection.FILE}: {place}", matrix.to(dtype))
        return rest

    def state(self, weights: Sequence[float]) -> State:
        """The merged weights in memory."""
        weights = self.check(weights)
        return {key: self.tensor(key, weights) for key in self.base.keys()}  # noqa: SIM118

    def into(self, shell: nn.Module, weights: Sequence[float]) -> nn.Module:
        """The whole merged model, in a module of the base's architecture: what a search evaluates."""
        shell.load_state_dict(self.state(weights))
        return projection.attach(shell, self.unfolded(weights))


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(tensor.float()).all():
        raise UserError(f"{name}: the merged tensor is not finite; look for NaN in the experts, or lower the weights")
    return tensor


def write_merged(
    merger: Merger, weights: Sequence[float], out: Path, *, recipe: Mapping[str, Any] | None = None
) -> None:
    """Stream the merged component into the folder `out`, sharded like the base, its recipe in the files' metadata.

    Projections that fold into no weight are left beside the weights, and logged.
    """
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
    _write_unfolded(merger.unfolded(weights), out, metadata)


def _write_unfolded(rest: State, out: Path, metadata: Mapping[str, str]) -> None:
    if not rest:
        (out / projection.FILE).unlink(missing_ok=True)  # of a merge that was here before
        return
    projection.save(out, rest, metadata)
    log.warning(
        "%s: the projections after %s fold into no weight; stock diffusers loads the model without them, "
        "deme_diffusion.attach_projection adds them",
        out / projection.FILE,
        ", ".join(rest),
    )


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
