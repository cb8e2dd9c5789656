"""How a model merged by task arithmetic depends on its weights, projections included: dL/dw from dL/dK, streamed.

K(w) = P(w) (theta + sum_i w_i tau_i) with P = I + sum_i w_i D_i for every projection that folds into K: linear or, with
projections, of second order in w. dL/dw_i = <dL/dK, dK/dw_i> (METHOD.md section 8), one parameter in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from deme_diffusion.config import MergeSettings
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.search.objective import Given
from deme_diffusion.merging.search.space import REST, Space
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.vectors import wide
from deme_diffusion.models import projection
from deme_diffusion.models.placement import BLOCK, weighted_as

Compose = Callable[[Given], MergeWeights]
"""The weights of a candidate -> those of a merge: with what the recipe says of some parameters."""


@dataclass
class Differential:
    """A merger's model as a function of w. `shell` is a module of the base's architecture, overwritten each time."""

    merger: Merger
    shell: nn.Module
    compose: Compose = MergeWeights.of

    @property
    def unfolded(self) -> list[str]:
        """The places whose D fold into no weight."""
        return self.merger.unfolded_places

    def prepare(self, weights: Given) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """The merged module, and its parameters and attached projections, which want a gradient."""
        composed = self.compose(weights)
        module = self.merger.into(self.shell, composed)
        projection.attach(module, {**self._zeros(), **self.merger.unfolded(composed)})  # D = 0 has a gradient as well
        tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
        tensors |= {projection.buffer_of(p): module.get_buffer(projection.buffer_of(p)) for p in self.unfolded}
        return module, {name: tensor.requires_grad_(True) for name, tensor in tensors.items()}

    def _zeros(self) -> dict[str, torch.Tensor]:
        like = {place: matrix for matrices in self.merger.matrices for place, matrix in matrices.items()}
        return {place: torch.zeros_like(like[place]) for place in self.unfolded}

    def pull_back(self, weights: Given, gradients: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, ...]]:
        """Pattern of the candidate -> dL/dw (N,), '' for its plain weights; what the recipe fixes has no part in it."""
        free, composed = MergeWeights.of(weights), self.compose(weights)
        sums: dict[str, list[list[float]]] = {REST: [], **{pattern: [] for pattern in free.rules}}
        for name, pulled in self._pulled(composed, gradients):
            pattern = _pattern(name, composed)
            fixed = pattern not in sums or composed.rules.get(pattern) != free.rules.get(pattern)
            if composed.kept(name) is None and not fixed:
                sums[pattern].append(pulled())
        count = len(self.merger.experts)
        return {p: tuple(math.fsum(row[i] for row in rows) for i in range(count)) for p, rows in sums.items()}

    def _pulled(
        self, weights: MergeWeights, gradients: Mapping[str, torch.Tensor]
    ) -> list[tuple[str, Callable[[], list[float]]]]:
        """(name by which it gets its weights, what computes its part of dL/dw) of every tensor with a gradient."""
        parts: list[tuple[str, Callable[[], list[float]]]] = []
        for key in self.merger.keys():  # noqa: SIM118 - a merger is no mapping
            if key in gradients and self.merger.base.dtype(key).is_floating_point and self.merger.moved(key):
                parts.append((key, lambda key=key: self._of_weight(key, weights.at(key), gradients[key])))  # type: ignore[misc]
        for place in self.unfolded:
            given = gradients[projection.buffer_of(place)]
            parts.append((weighted_as(place), lambda place=place, given=given: self._of_matrix(place, given)))  # type: ignore[misc]
        return parts

    def _of_weight(self, key: str, at: Sequence[float], gradient: torch.Tensor) -> list[float]:
        """<dL/dK, dK/dw_i> of one weight, by the chain through Eq. 8 and the projections that fold into it."""
        base = wide(self.merger.base.tensor(key)).to(gradient.device)
        vectors = [wide(expert.tensor(key)).to(gradient.device) - base for expert in self.merger.experts]
        stacked = torch.stack(vectors).reshape(len(vectors), -1)
        matrices = [self._matrices(place, base) for place in self.merger.folding(key)]

        def merged(w: torch.Tensor) -> torch.Tensor:
            tensor = (base.flatten() + w @ stacked).reshape(base.shape)
            for each in matrices:
                tensor = projection.fold_tensor(tensor, torch.tensordot(w, each, 1))
            return tensor

        pull: Any = torch.func.vjp(merged, torch.tensor(at, dtype=base.dtype, device=base.device))[1]
        return [float(part) for part in pull(gradient.to(base.dtype))[0]]

    def _of_matrix(self, place: str, gradient: torch.Tensor) -> list[float]:
        return [float((each * gradient).sum()) for each in self._matrices(place, wide(gradient))]

    def _matrices(self, place: str, like: torch.Tensor) -> torch.Tensor:
        """The D_i of one name (N, C, C) or, spatial, (N, C, 1, 3, 3); 0 where an expert has none."""
        own = [matrices.get(place) for matrices in self.merger.matrices]
        zeros = torch.zeros_like(next(matrix for matrix in own if matrix is not None))
        return torch.stack([zeros if matrix is None else matrix for matrix in own]).to(like.device, like.dtype)

    # -- what has weights of its own ---------------------------------------------------------------

    def space(self, settings: MergeSettings) -> Space:
        """Where a gradient search with `merge.granularity` looks: a group a model, a block or a layer."""
        count = len(self.merger.experts)
        if settings.granularity == "model":
            return Space(count, settings.bounds)
        sizes: dict[str, int] = {}
        for key in filter(self.merger.moved, self.merger.keys()):  # of what stays the base's no weight is searched
            pattern = group_of(key, settings.granularity)
            sizes[pattern] = sizes.get(pattern, 0) + math.prod(self.merger.base.shape(key))
        # Of several patterns that match the last one counts: a module's own parameters, then those of what is in it.
        patterns = sorted(sizes, key=lambda pattern: (pattern.count("."), pattern))
        if any(not any(fnmatchcase(weighted_as(place), pattern) for pattern in patterns) for place in self.unfolded):
            patterns, sizes = [REST, *patterns], {REST: 0, **sizes}
        total = sum(sizes.values())
        return Space(count, settings.bounds, tuple(patterns), tuple(sizes[pattern] / total for pattern in patterns))


def group_of(key: str, granularity: str) -> str:
    """The pattern of the block or layer that a parameter belongs to; blocks are a U-Net's, else what stands first."""
    module = key.rpartition(".")[0]
    if not module:
        return key
    if granularity == "layer":
        return f"{module}.*"
    block = BLOCK.match(module)
    return f"{block[0] if block else module.split('.')[0]}.*"


def _pattern(name: str, weights: MergeWeights) -> str:
    """The rule that a parameter's weights come from; '' for the plain ones."""
    return next((p for p in reversed(list(weights.rules)) if fnmatchcase(name, p)), REST)
