"""Points and directions of weight space: task vectors, random directions, and what a set of task vectors points along.

A point is the parameters of a served model by name, and by their places the projections that stay unfolded. A direction
may leave names out: it is 0 there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.analysis.models import Load
from deme_diffusion.errors import UserError
from deme_diffusion.merging.vectors import wide
from deme_diffusion.models.projection import attach, attached
from deme_diffusion.rng import generator

Vector = dict[str, torch.Tensor]
Array = npt.NDArray[np.float64]
NOTHING = 1e-10
"""Share of the squared norms below which a direction is rounding alone."""
AT_ONCE = 2**20
"""Entries of a tensor that are held in float64 at a time."""


def point_of(module: nn.Module) -> Vector:
    """Where a module stands: its parameters and attached projections themselves, not copies."""
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *attached(module).items())}


def task_vector(base: nn.Module, module: nn.Module, name: str) -> Vector:
    """tau = theta_i - theta by name, in float32 or wider, on the base's device; a projection that one of them lacks
    is 0 there. Raises UserError, which calls the model `name`, for another architecture."""
    theta, own = point_of(base), point_of(module)
    _check_alike(base, module, name)
    places = {**attached(base), **attached(module)}
    for place, matrix in places.items():
        for point in (theta, own):
            point.setdefault(place, torch.zeros_like(matrix))
    return {key: wide(own[key].to(value.device)) - wide(value) for key, value in theta.items()}


def _check_alike(base: nn.Module, module: nn.Module, name: str) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in base.named_parameters()}
    given = {key: tuple(tensor.shape) for key, tensor in module.named_parameters()}
    for key in sorted(wanted.keys() | given.keys()):
        if wanted.get(key) != given.get(key):
            has, base_has = (f"is {shapes[key]}" if key in shapes else "is missing" for shapes in (given, wanted))
            raise UserError(f"{name}: {key} {has}, in the base it {base_has}; a model finetuned from it is expected")


def inner(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """<one, other>, summed in float64."""
    return math.fsum(float(a @ b) for key in one if key in other for a, b in _parts(one[key], other[key]))


def left_over(vector: Vector, coefficients: Sequence[float], directions: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """|vector - sum_k c_k d_k|, summed in float64 part by part: the difference is never held whole."""
    squares = []
    for key in dict.fromkeys(key for one in (vector, *directions) for key in one):
        held = [(c, d[key]) for c, d in zip((1.0, *(-c for c in coefficients)), (vector, *directions), strict=True)
                if key in d]  # fmt: skip
        for parts in _parts(*(tensor for _, tensor in held)):
            rest = sum(c * part for (c, _), part in zip(held, parts, strict=True))
            squares.append(float(torch.as_tensor(rest).square().sum()))
    return math.sqrt(math.fsum(squares))


def _parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one size side by side, flat and in float64, a part at a time."""
    for parts in zip(*(torch.split(tensor.flatten(), AT_ONCE) for tensor in tensors), strict=True):
        yield tuple(part.double() for part in parts)


def combined(one: Vector, factor: float, other: Mapping[str, torch.Tensor]) -> Vector:
    """one + factor x other, in place of `one`."""
    for key, tensor in other.items():
        one[key] = one[key].add_(tensor, alpha=factor) if key in one else tensor * factor
    return one


# -- a module that moves --------------------------------------------------------------------------


class Shell:
    """One copy of the base that is set to base + sum_k c_k d_k, again and again."""

    def __init__(self, base: nn.Module, directions: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self.directions = directions
        self.module = copy.deepcopy(base).eval()  # as the base in all else: torch picks kernels by requires_grad too
        names = dict(base.named_parameters())
        missing = {key: torch.zeros_like(d[key]) for d in directions for key in d if key not in names}
        if missing:
            attach(self.module, {**missing, **attached(base)})
        self._start, self._own = point_of(base), point_of(self.module)

    @torch.no_grad()
    def at(self, *coefficients: float) -> nn.Module:
        """The module at base + sum_k c_k d_k, formed in float32 or wider; the base to the bit where all c_k are 0."""
        for key, own in self._own.items():
            value = wide(self._start[key]) if key in self._start else torch.zeros_like(own)
            for coefficient, direction in zip(coefficients, self.directions, strict=True):
                if coefficient and key in direction:
                    value = value.add(direction[key].to(value.device), alpha=coefficient)
            own.copy_(value)
        return self.module


# -- random directions ----------------------------------------------------------------------------


def random_direction(base: nn.Module, seed: int, number: int) -> Vector:
    """A filter-normalised random direction (Li et al. 2018, section 4): Gaussian, and every filter (a slice along the
    first axis of a parameter of two axes or more) as long as the model's own; biases and norms stay as they are.

    Draws are keyed by (seed, number, name of the parameter).
    """
    return {
        name: _like_filters(own.detach(), generator(seed, "landscape direction", number, name))
        for name, own in base.named_parameters()
        if own.ndim > 1
    }


def _like_filters(own: torch.Tensor, draws: np.random.Generator) -> torch.Tensor:
    noise = torch.from_numpy(draws.standard_normal(tuple(own.shape), dtype=np.float32)).to(own.device)
    flat, own_flat = noise.flatten(1), wide(own).flatten(1)
    scale: torch.Tensor = own_flat.norm(dim=1) / flat.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return flat.mul(scale[:, None]).reshape(own.shape)


# -- what the task vectors point along ------------------------------------------------------------


@dataclass(frozen=True)
class Leading:
    """The leading directions of N task vectors, at most two, orthogonal and each of length `unit`.

    `unit` is the root mean square norm of the task vectors, `shares` what part of their squared norms each direction
    explains, `coordinates` (N, 2) where the task vectors lie along them, `norms` (N,) their lengths.
    """

    directions: list[Vector]
    unit: float
    shares: list[float]
    coordinates: Array
    norms: Array


def leading_directions(base: nn.Module, experts: Sequence[Load], names: Sequence[str]) -> Leading:
    """Principal directions about the base (not about the mean), by the N x N Gram matrix of the task vectors.

    Models are loaded two at a time, each several times over: N task vectors are never held together.
    """
    gram = gram_matrix(base, experts, names)
    unit = float(np.sqrt(np.trace(gram) / len(gram)))
    values, vectors = principal(gram)
    directions: list[Vector] = [{} for _ in values]
    for k, load in enumerate(experts if directions else ()):
        vector = task_vector(base, load(), names[k])
        for m, direction in enumerate(directions):
            combined(direction, float(vectors[k, m] / np.sqrt(values[m]) * unit), vector)
        del vector  # before the next one is made
    coordinates = np.zeros((len(gram), 2))
    coordinates[:, : len(values)] = vectors * np.sqrt(values) / (unit or 1.0)
    shares = [float(value / np.trace(gram)) for value in values]
    return Leading(directions, unit, shares, coordinates, np.sqrt(np.diagonal(gram)))


def principal(gram: Array, most: int = 2) -> tuple[Array, Array]:
    """The largest eigenvalues (m,) of a Gram matrix, less those that are rounding, and their vectors (N, m).

    The sign of a vector is that which makes its largest entry positive.
    """
    values, vectors = np.linalg.eigh(gram)
    kept = [k for k in reversed(range(len(values))) if values[k] > NOTHING * np.trace(gram)][:most]
    values, vectors = values[kept], vectors[:, kept]
    largest = np.abs(vectors).argmax(axis=0)
    return values, vectors * np.sign(vectors[largest, np.arange(len(kept))])


def gram_matrix(base: nn.Module, experts: Sequence[Load], names: Sequence[str]) -> Array:
    """<tau_i, tau_j> of all pairs, (N, N). Raises UserError for a model whose weights are not finite."""
    gram = np.zeros((len(experts), len(experts)))
    for i, load in enumerate(experts):
        vector = task_vector(base, load(), names[i])
        gram[i, i] = inner(vector, vector)
        if not np.isfinite(gram[i, i]):
            raise UserError(f"{names[i]}: some of its weights are no finite numbers; train it again")
        for j in range(i + 1, len(experts)):
            gram[i, j] = gram[j, i] = inner(vector, task_vector(base, experts[j](), names[j]))
        del vector  # before the next one is made
    return gram
