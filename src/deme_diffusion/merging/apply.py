"""N + 1 checkpoints become one, parameter by parameter: projections merged and then folded.

Order matters: D is its own task vector, so the merged P is I + sum_i w_i D_i, folded into the merged K. Folding each
expert first and merging then gives another model (4e-3 relative at deltas of 1e-2). Where P folds into no weight the
merged D stays: `projection.safetensors` beside the merged weights, which stock diffusers does not read.

Sums are in float32, or in float64 where the tensors are. A pointwise method may be given a parameter in slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from deme_diffusion.config import MethodOptions
from deme_diffusion.errors import UserError
from deme_diffusion.merging.information import PROJECTION, check_count, check_information
from deme_diffusion.merging.methods import Parameter, function
from deme_diffusion.merging.selection import Kept, MergeWeights
from deme_diffusion.merging.table import method as row_of
from deme_diffusion.merging.thresholds import global_thresholds
from deme_diffusion.merging.vectors import Weight, slices, wide
from deme_diffusion.models import projection
from deme_diffusion.models.placement import is_block, operations
from deme_diffusion.models.projection import fold_tensor
from deme_diffusion.weights import State, Weights, check_same_keys

NO_OPTIONS = MethodOptions()
Given = MergeWeights | Sequence[float]
Tensors = Sequence[torch.Tensor]


class Merger:
    """A base and N experts, opened and checked before a byte is merged; a `with` closes the files.

    `base` and `experts` are component folders or safetensors files (`checkpoints.locate` finds them), `fisher` the
    files of the Fisher method, one an expert. `notes` are to be told to the user; that an expert equals the base is
    known once the merged model is written.
    """

    def __init__(
        self,
        base: Path,
        experts: Sequence[Path],
        method: str = "task_arithmetic",
        options: MethodOptions = NO_OPTIONS,
        fisher: Sequence[Path] = (),
    ) -> None:
        self.row = row_of(method)
        self.options, self._merge = self.row.resolved(options), function(method)
        if not experts:
            raise UserError("no experts: a merge takes a base and at least one expert")
        self.row.check(len(experts))
        self._stack, self.notes = ExitStack(), list[str]()
        try:
            self._open(base, experts, fisher)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Merger:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self, base: Path, experts: Sequence[Path], fisher: Sequence[Path]) -> None:
        self.base = self._stack.enter_context(Weights(base))
        self.experts = [self._stack.enter_context(Weights(path)) for path in experts]
        for expert in self.experts:
            check_same_keys(self.base, expert)
            self._note_dtypes(expert)
        projection.refuse_beside(_folder(base))
        self.matrices = [projection.load(_folder(path)) for path in experts]
        self._place(experts)
        check_count(self.row, len(fisher), len(experts))
        self.fisher = [self._stack.enter_context(Weights(path)) for path in fisher]
        names = {f"{PROJECTION}{place}" for own in self.matrices for place in own}
        self.notes += [note for own in self.fisher for note in check_information(own, self.base, names)]

    def _note_dtypes(self, expert: Weights) -> None:
        differ = [key for key in self.keys() if self.base.dtype(key) != expert.dtype(key)]
        if differ:
            key = differ[0]
            self.notes.append(
                f"{expert.path}: {len(differ)} of {len(self.keys())} tensors have another dtype than the base's "
                f"({key}: {_short(expert.dtype(key))}, the base's {_short(self.base.dtype(key))}); merged in float32"
            )

    def _place(self, experts: Sequence[Path]) -> None:
        """Which places act on each operation, an operation's own before its block's, and which fold into none."""
        shapes = {key: self.base.shape(key) for key in self.keys()}
        for path, matrices in zip(experts, self.matrices, strict=True):
            projection.check_fits(matrices, shapes, _folder(path) / projection.FILE, str(self.base.path))
        places = {place for matrices in self.matrices for place in matrices}
        self._onto: dict[str, list[str]] = {}
        self._unfolded: list[str] = []
        for place in sorted(places, key=lambda place: (is_block(place), place)):
            onto = operations(place, shapes)
            for operation in onto:
                self._onto.setdefault(operation, []).append(place)
            if not onto:
                self._unfolded.append(place)

    # -- weights -----------------------------------------------------------------------------------

    def keys(self) -> list[str]:
        """Names of the parameters and buffers."""
        return self.base.keys()

    def check(self, weights: Given) -> MergeWeights:
        """The weights, one an expert. Raises UserError otherwise, or for a pattern that matches nothing."""
        return MergeWeights.of(weights).check(self.keys(), len(self.experts))

    def source(self, key: str, weights: MergeWeights) -> tuple[Kept | None, Sequence[float]]:
        """Whose tensor a parameter is as it stands, or None and the weights by which it is merged."""
        kept, values = weights.kept(key), weights.at(key)
        if not self._floating(key):
            return "base", values  # a buffer of indices or counts, which no task vector can move
        return ("base" if kept is None and not any(values) else kept), values

    def sliced(self, key: str) -> bool:
        """Whether the parameter may be merged in slices: nothing mixes its entries."""
        return self.row.pointwise and not self._onto.get(key.rpartition(".")[0])

    # -- tensors -----------------------------------------------------------------------------------

    def part(
        self, key: str, weights: MergeWeights, base: torch.Tensor, experts: Tensors, at: slice = slice(None)
    ) -> torch.Tensor:
        """One parameter merged, unfolded and in float32 or wider; or entries `at` of it, where it is `sliced`."""
        whose, values = self.source(key, weights)
        if whose is not None:
            return base if whose == "base" else experts[whose]
        if self.row.spectral:  # a decomposition may end in an error of its own
            for reader, tensor in zip(self.experts, experts, strict=True):
                if not finite(tensor):
                    raise UserError(f"{key}: the merged tensor would not be finite: NaN or infinity in {reader.path}")
        information = [reader.tensor(key).reshape(-1)[at].reshape(base.shape) for reader in self.fisher] or None
        return self._call(key, base, experts, values, information).reshape(base.shape)

    def tensor(self, key: str, weights: Given, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One merged and folded parameter, in the base's dtype or `dtype`. Raises UserError when it is not finite."""
        weights = MergeWeights.of(weights)
        base, experts = self.base.tensor(key), [expert.tensor(key) for expert in self.experts]
        merged = self.part(key, weights, base, experts)
        for place in self._onto.get(key.rpartition(".")[0], ()):
            if (matrix := self.matrix(place, key, weights)) is not None:
                merged = fold_tensor(wide(computable(merged)), matrix)
        return self.finished(key, merged, dtype)

    def finished(self, key: str, merged: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """In the dtype in which it is written. Raises UserError when it is not finite."""
        merged = merged.to(self.dtype_of(key, dtype))
        self._check_finite(key, merged)  # the check last: half precision overflows here
        return merged

    def _call(
        self, name: str, base: torch.Tensor, experts: Tensors, values: Sequence[float], information: Tensors | None
    ) -> torch.Tensor:
        parameter = Parameter(
            name,
            Weight(computable(base)),
            [Weight(computable(expert)) for expert in experts],
            list(values),
            self.options,
            self._thresholds,
            information,
        )
        return self._merge(parameter).value

    def matrix(self, place: str, key: str, weights: MergeWeights) -> torch.Tensor | None:
        """The merged D at one place, as it folds into the tensor `key`; None where no expert with a weight has one.

        D is a parameter of its own, whose task vectors are the D_i.
        """
        kept, values = weights.kept(key), weights.at(key)
        if kept is not None:
            return None if kept == "base" else self.matrices[kept].get(place)
        own = [matrices.get(place) for matrices in self.matrices]
        acting = [w * wide(matrix) for w, matrix in zip(values, own, strict=True) if w and matrix is not None]
        if not acting:
            return None
        if self.row.name == "task_arithmetic":
            return torch.stack(acting).sum(0)  # Eq. 8 on a base of 0, in the order of sums that merged models have had
        zeros = torch.zeros_like(next(matrix for matrix in own if matrix is not None))
        experts = [zeros if matrix is None else matrix for matrix in own]
        return self._call(f"{PROJECTION}{place}", zeros, experts, values, self._fisher_of(place, zeros))

    def _fisher_of(self, place: str, like: torch.Tensor) -> Tensors | None:
        if not self.fisher:
            return None
        name = f"{PROJECTION}{place}"
        if all(name in reader.keys() for reader in self.fisher):  # noqa: SIM118 - Weights is no mapping
            return [reader.tensor(name) for reader in self.fisher]
        return [torch.ones_like(like) for _ in self.fisher]

    @cached_property
    def _thresholds(self) -> list[float] | None:
        """Of TIES with trim=global: the least |tau_i| that stays of each expert; two passes over all checkpoints."""
        if self.options.trim != "global":
            return None
        assert self.options.density is not None
        return global_thresholds(self._vectors, len(self.experts), self.options.density)

    def _vectors(self) -> Iterator[list[torch.Tensor]]:
        """tau_i of every parameter, in slices, and of the projections."""
        for key in filter(self._floating, self.keys()):
            base, *experts = (reader.tensor(key).reshape(-1) for reader in (self.base, *self.experts))
            for at in slices(base.numel()):
                theta, *others = (wide(computable(part[at])) for part in (base, *experts))
                yield [other - theta for other in others]
        for _, _, experts in self.projections():
            yield experts

    def projections(self) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
        """Name, base (0) and D_i of every place as a parameter of its own; 0 where an expert has none."""
        for place in sorted({place for own in self.matrices for place in own}):
            zeros = torch.zeros_like(next(own[place] for own in self.matrices if place in own))
            yield f"{PROJECTION}{place}", zeros, [own.get(place, zeros) for own in self.matrices]

    def dtype_of(self, key: str, dtype: torch.dtype | None) -> torch.dtype:
        """What a parameter is written in: `dtype` where it is floating, else as in the base."""
        return dtype if dtype is not None and self._floating(key) else self.base.dtype(key)

    def _floating(self, key: str) -> bool:
        return self.base.dtype(key).is_floating_point

    def unfolded(self, weights: Given) -> State:
        """Place -> merged D where it folds into no weight: the model's extra module; empty where all of it folds."""
        weights, rest = self.check(weights), {}
        for place in self._unfolded:
            if (matrix := self.matrix(place, f"{place}.weight", weights)) is not None:
                dtype = next(matrices[place].dtype for matrices in self.matrices if place in matrices)
                rest[place] = matrix.to(dtype)
                if not finite(rest[place]):
                    raise UserError(f"{projection.FILE}: {place}: the merged tensor is not finite")
        return rest

    def state(self, weights: Given) -> State:
        """The merged weights in memory."""
        weights = self.check(weights)
        return {key: self.tensor(key, weights) for key in self.keys()}

    def into(self, shell: nn.Module, weights: Given) -> nn.Module:
        """The whole merged model, in a module of the base's architecture: what a search evaluates."""
        shell.load_state_dict(self.state(weights))
        return projection.attach(shell, self.unfolded(weights))

    def note_equal(self, equal: Sequence[bool]) -> None:
        """Keep for the user which experts were found to be the base."""
        found = [f"{own.path}: equals the base" for own, same in zip(self.experts, equal, strict=True) if same]
        self.notes += [note for note in found if note not in self.notes]

    # -- faults ------------------------------------------------------------------------------------

    def _check_finite(self, key: str, merged: torch.Tensor) -> None:
        """Raises UserError that names the tensor, and the checkpoint at fault where it is one."""
        if finite(merged):
            return
        places, readers = self._onto.get(key.rpartition(".")[0], ()), (*self.experts, self.base, *self.fisher)
        faults = [reader.path for reader in readers if not finite(reader.tensor(key))]
        for reader, own in zip(self.experts, self.matrices, strict=True):
            if not all(finite(own[place]) for place in places if place in own):
                faults.append(_folder(reader.path) / projection.FILE)
        bad = next(iter(faults), None)
        why = f"NaN or infinity in {bad}" if bad else f"too large for {_short(merged.dtype)}; lower the weights"
        raise UserError(f"{key}: the merged tensor is not finite: {why}")


def finite(tensor: torch.Tensor) -> bool:
    """Whether every entry is: one sum, and a look at each only where that overflows or is not finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    tensor = computable(tensor)
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def computable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or in float32 where it is float8, which torch only stores."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _folder(path: Path) -> Path:
    """Where a checkpoint's projections lie: beside its weights."""
    return path if path.is_dir() else path.parent


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
