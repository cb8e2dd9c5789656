"""N + 1 checkpoints become one, parameter by parameter: projections merged and then folded.

Order matters: D is its own task vector, so the merged P is I + sum_i w_i D_i, folded into the merged K. Folding each
expert first and merging then gives another model (4e-3 relative at deltas of 1e-2). Where P folds into no weight the
merged D stays: `projection.safetensors` beside the merged weights, which stock diffusers does not read.

Sums are in float32, or in float64 where the tensors are. A pointwise method may be given a parameter in slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from deme_diffusion.config import MethodOptions
from deme_diffusion.errors import UserError
from deme_diffusion.merging.methods import Parameter, Thresholds, function, thresholds_of
from deme_diffusion.merging.opening import Parents, folder_of, short
from deme_diffusion.merging.selection import Kept, MergeWeights
from deme_diffusion.merging.table import method as row_of
from deme_diffusion.merging.thresholds import global_thresholds, magnitudes, task_vectors
from deme_diffusion.merging.vectors import Weight, computable, finite, wide
from deme_diffusion.models import projection
from deme_diffusion.models.placement import weighted_as
from deme_diffusion.models.projection import fold_tensor
from deme_diffusion.weight_files import PROJECTION_KEY
from deme_diffusion.weights import State

NO_OPTIONS = MethodOptions()
Given = MergeWeights | Sequence[float]
Tensors = Sequence[torch.Tensor]


class Merger(Parents):
    """A base and N experts, opened and checked, and how they are merged; the arguments are those of `Parents`."""

    def __init__(
        self,
        base: Path,
        experts: Sequence[Path],
        method: str = "task_arithmetic",
        options: MethodOptions = NO_OPTIONS,
        fisher: Sequence[Path] = (),
    ) -> None:
        row = row_of(method)
        self.options, self._merge = row.resolved(options), function(method)
        super().__init__(base, experts, row, fisher)

    def __enter__(self) -> Merger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- weights -----------------------------------------------------------------------------------

    def check(self, weights: Given) -> MergeWeights:
        """The weights, one an expert. Raises UserError otherwise, or for a pattern that matches nothing."""
        return MergeWeights.of(weights).check(self.keys(), len(self.experts))

    def source(self, key: str, weights: MergeWeights) -> tuple[Kept | None, Sequence[float]]:
        """Whose tensor a parameter is as it stands, or None and the weights by which it is merged."""
        kept, values = weights.kept(key), weights.at(key)
        if kept is None and (not self._floating(key) or not any(values) or not self.moved(key)):
            return "base", values  # or a buffer of indices or counts, which no task vector can move
        return kept, values

    def sliced(self, key: str) -> bool:
        """Whether the parameter may be merged in slices: nothing mixes its entries."""
        return self.row.pointwise and not self.folding(key) and self.lies_whole(key)

    # -- tensors -----------------------------------------------------------------------------------

    def looks(self, key: str, weights: MergeWeights) -> bool:
        """Whether the slices of a parameter need thresholds from all of it."""
        return self.row.thresholds and self._thresholds is None and self.source(key, weights)[0] is None

    def thresholds(self, key: str, i: int) -> Thresholds:
        """Of one whole task vector, which is read for it: what `part` needs where the parameter `looks`."""
        size = magnitudes(computable(self.base.tensor(key)), computable(self.experts[i].tensor(key)))
        return thresholds_of(self.row.name)(size, self.options)

    def part(
        self,
        key: str,
        weights: MergeWeights,
        base: torch.Tensor,
        experts: Tensors,
        at: slice = slice(None),
        thresholds: Sequence[Thresholds] | None = None,
    ) -> torch.Tensor:
        """One parameter merged, unfolded and in float32 or wider; or entries `at` of it, where it is `sliced`."""
        whose, values = self.source(key, weights)
        if whose is not None:
            return base if whose == "base" else experts[whose]
        if self.row.spectral:  # a decomposition may end in an error of its own
            for reader, tensor in zip(self.experts, experts, strict=True):
                if not finite(tensor) and self._mask(key):
                    return base
                if not finite(tensor):
                    raise UserError(f"{key}: the merged tensor would not be finite: NaN or infinity in {reader.path}")
        information = [reader.tensor(key).reshape(-1)[at].reshape(base.shape) for reader in self.fisher] or None
        return self.method_on(key, base, experts, values, information, at.start or 0, thresholds).reshape(base.shape)

    def tensor(self, key: str, weights: Given, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One merged and folded parameter, in the base's dtype or `dtype`. Raises UserError when it is not finite."""
        weights = MergeWeights.of(weights)
        base, experts = self.base.tensor(key), [expert.tensor(key) for expert in self.experts]
        merged = self.part(key, weights, base, experts)
        for place in self.folding(key):
            if (matrix := self.matrix(place, key, weights)) is not None:
                merged = fold_tensor(wide(computable(merged)), matrix)
        return self.finished(key, merged, dtype, base)

    def finished(self, key: str, merged: torch.Tensor, dtype: torch.dtype | None, base: torch.Tensor) -> torch.Tensor:
        """In the dtype in which it is written; `base`: the base's entries. Raises UserError when it is not finite."""
        merged = merged.to(self.dtype_of(key, dtype))
        if finite(merged):  # the check last: half precision overflows here
            return merged
        if self._mask(key) and torch.equal(computable(base.to(merged.dtype)).isinf(), computable(base).isinf()):
            return base.to(merged.dtype)
        self._check_finite(key, merged)
        return merged

    def _mask(self, key: str) -> bool:
        """Whether all models share a tensor with infinities, whose task vectors are no number though nothing is wrong.

        Never of one onto which a projection folds.
        """
        base = self.base.tensor(key).double()
        same = all(torch.equal(base, own.tensor(key).double()) for own in self.experts)
        return same and not finite(base) and not self.folding(key)

    def method_on(
        self,
        name: str,
        base: torch.Tensor,
        experts: Tensors,
        values: Sequence[float],
        information: Tensors | None,
        first: int = 0,
        thresholds: Sequence[Thresholds] | None = None,
    ) -> torch.Tensor:
        """The method itself on the tensors of one parameter, or of a slice of it."""
        parameter = Parameter(
            name,
            Weight(computable(base)),
            [Weight(computable(expert)) for expert in experts],
            list(values),
            self.options,
            thresholds or self._thresholds,
            information,
            first,
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
        return self.method_on(f"{PROJECTION_KEY}{place}", zeros, experts, values, self._fisher_of(place, zeros))

    def _fisher_of(self, place: str, like: torch.Tensor) -> Tensors | None:
        if not self.fisher:
            return None
        name = f"{PROJECTION_KEY}{place}"
        if all(name in reader.keys() for reader in self.fisher):  # noqa: SIM118 - Weights is no mapping
            return [reader.tensor(name) for reader in self.fisher]
        return [torch.ones_like(like) for _ in self.fisher]

    @cached_property
    def _thresholds(self) -> list[Thresholds] | None:
        """Of TIES with trim=global: the least |tau_i| that stays of each expert; two passes over all checkpoints."""
        if self.options.trim != "global":
            return None
        assert self.options.density is not None
        matrices = [own for _, _, own in self.projections()]
        found = global_thresholds(
            lambda: chain(task_vectors(self.base, self.experts), matrices), len(self.experts), self.options.density
        )
        return [(least,) for least in found]

    def dtype_of(self, key: str, dtype: torch.dtype | None) -> torch.dtype:
        """What a parameter is written in: `dtype` where it is floating, else as in the base."""
        return dtype if dtype is not None and self._floating(key) else self.base.dtype(key)

    def _floating(self, key: str) -> bool:
        return self.base.dtype(key).is_floating_point

    def unfolded(self, weights: Given) -> State:
        """Name -> merged D where it folds into no weight: the model's extra module; empty where all of it folds."""
        weights, rest = self.check(weights), {}
        for place in self.unfolded_places:
            if (matrix := self.matrix(place, weighted_as(place), weights)) is not None:
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

    # -- faults ------------------------------------------------------------------------------------

    def _check_finite(self, key: str, merged: torch.Tensor) -> None:
        """Raises UserError that names the tensor, and the checkpoint at fault where it is one."""
        if finite(merged):
            return
        places, readers = self.folding(key), (*self.experts, self.base, *self.fisher)
        faults = [reader.path for reader in readers if not finite(reader.tensor(key))]
        for reader, own in zip(self.experts, self.matrices, strict=True):
            if not all(finite(own[place]) for place in places if place in own):
                faults.append(folder_of(reader.path) / projection.FILE)
        bad = next(iter(faults), None)
        why = f"NaN or infinity in {bad}" if bad else f"too large for {short(merged.dtype)}; lower the weights"
        raise UserError(f"{key}: the merged tensor is not finite: {why}")
