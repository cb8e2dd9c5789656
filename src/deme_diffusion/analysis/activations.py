"""What finetuning changes in the activations, along channels and along space (Fig. 2).

Delta = F' - F at the same x_t and t: F is what a block gives in the pretrained model, F' in another. Kept are the means
over the images of |Delta| and of |F| at each channel c and position p, for each half of the images, and no activations.

How they vary is read from m(c, p) = m + a_c + b_p + rest: the coefficient of variation along channels is the standard
deviation of a_c by m, along space that of b_p by m. A mean over more entries varies less by chance, and a block has
more positions than channels or fewer, so variances are unbiased: products of the two halves, which share no image. The
rest is alike at neighbouring positions, so it does not average out along them as chance would: a_c is compared between
two parts of space that lie apart. From b_p, which is a mean over channels, what the rest leaves in one is taken off.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.analysis.models import Load, protocol
from deme_diffusion.config import AnalyzeSettings
from deme_diffusion.division import Runs, from_runs
from deme_diffusion.errors import UserError
from deme_diffusion.figure_file import write_figure
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.models.placement import BLOCK
from deme_diffusion.models.precision import computes_in, wide

log = logging.getLogger(__name__)
Array = npt.NDArray[np.float64]
KINDS = ("change", "base", "relative")
"""Whose variation: |Delta|, |F|, and |Delta| by |F| at each channel and position."""
LEAST = 0.01
"""Of the place's mean |F|: |F| below it counts as this much where the change is divided by it."""
ROUNDING = 1e-5
"""A mean |Delta| below this share of the mean |F| is rounding, in float32: it has no variation to tell of."""
TEXT_FIRST = ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
"""Blocks that give (states of the text, states of the image)."""
_OTHER_BLOCK = re.compile(r"(\w*blocks|layers)\.\d+")


@dataclass
class Means:
    """Sums, then means, over images at one place: of |F| and |Delta|, (2 halves, channels, positions)."""

    shape: tuple[int, ...]
    base: Array
    change: Array

    def __add__(self, other: Means) -> Means:
        return Means(self.shape, self.base + other.base, self.change + other.change)

    def __mul__(self, factor: float | Array) -> Means:
        return Means(self.shape, self.base * factor, self.change * factor)


def write_activations(
    path: Path,
    noise: FixedNoise,
    base: nn.Module,
    experts: Sequence[Load],
    merged: Load | None,
    settings: AnalyzeSettings,
    *,
    served: Sequence[Runs],
    names: Sequence[str],
) -> dict[str, Any]:
    """Leave the data of the figure: each expert on its own subset, `noise.ranges[i]`, the merged model on the ranges
    that are `served`, which are [0, T) once, also where subsets overlap.

    By place k: `channels_k` (models, C) and `positions_k` (models, h, w), or (models, tokens): the mean |Delta| by the
    place's mean |F|, and `base_channels_k`, `base_positions_k` of |F|; `sizes` (models, places); `variations` (models,
    places, 3 `KINDS`, 2): along channels and along positions, below 0 where a variance was estimated to be, NaN where
    there is no change. Returns the medians over places: the merged model's, or where there is none the mean of the
    experts'.
    """
    on = protocol(noise, settings)
    where, models = places(base), [*names, *(["merged"] if merged else [])]
    found = _measured(noise, base, experts, merged() if merged else None, served, names, where)
    sizes = np.array([[_by(one.change.mean(), one.base.mean()) for one in means] for means in found])
    rounding = max(ROUNDING, torch.finfo(computes_in(base)).eps)
    varied = np.array([[variations(one, rounding) for one in means] for means in found])
    medians = [_medians(size, kinds) for size, kinds in zip(sizes, varied, strict=True)]
    told = {"models": models, "places": where, "kinds": KINDS, "axes": ("channels", "positions"), "medians": medians}
    write_figure(
        path,
        "activations",
        {**told, "protocol": on},
        sizes=sizes,
        variations=varied,
        **_profiles(found),
    )
    return medians[-1] if merged else _mean_of(medians)


def _measured(
    noise: FixedNoise,
    base: nn.Module,
    experts: Sequence[Load],
    merged: nn.Module | None,
    served: Sequence[Runs],
    names: Sequence[str],
    where: Sequence[str],
) -> list[list[Means]]:
    """Of each expert, then of the merged model, by place. What an expert serves is its subset, mostly: then both see
    the same points, and the base runs once."""
    found, parts = list[list[Means]](), list[list[Means]]()
    for runs, own, load, name in zip(noise.ranges, served, experts, names, strict=True):
        log.info("activations of %s", name)
        beside = [merged] if merged is not None and own == runs else []
        of_expert, *rest = measure(noise, runs, base, [load(), *beside], where)
        found.append(of_expert)
        if merged is not None and own:  # an expert may serve no timestep
            mass = noise.denoiser.mass(from_runs(own))
            parts.append([one * mass for one in (rest or measure(noise, own, base, [merged], where))[0]])
    if parts:
        total = sum(noise.denoiser.mass(from_runs(own)) for own in served)
        found.append([sum(place[1:], place[0]) * (1 / total) for place in zip(*parts, strict=True)])
    return found


def _profiles(found: Sequence[Sequence[Means]]) -> dict[str, npt.NDArray[np.float32]]:
    """The means along one axis, of every model by place, in units of the place's mean |F|."""
    arrays = {}
    for k in range(len(found[0])):
        by_model = [means[k] for means in found]
        for name, kind in (("", "change"), ("base_", "base")):
            m = np.stack([getattr(one, kind).mean(0) / (one.base.mean() or 1.0) for one in by_model])
            arrays[f"{name}channels_{k}"] = m.mean(2).astype(np.float32)
            arrays[f"{name}positions_{k}"] = m.mean(1).reshape(len(m), *by_model[0].shape).astype(np.float32)
    return arrays


def _medians(sizes: Array, kinds: Array) -> dict[str, float | None]:
    """Over the places: the change's size, and its, the base's and the relative variation along both axes."""
    told = {"size": sizes}
    for k, kind in enumerate(KINDS):
        told |= {f"{kind} {axis}": kinds[:, k, a] for a, axis in enumerate(("channels", "positions"))}
    finite = {name: values[np.isfinite(values)] for name, values in told.items()}
    return {name: float(np.median(values)) if len(values) else None for name, values in finite.items()}


def _mean_of(medians: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    held = {name: [value for one in medians if (value := one[name]) is not None] for name in medians[0]}
    return {name: float(np.mean(values)) if values else None for name, values in held.items()}


# -- places ---------------------------------------------------------------------------------------


def places(module: nn.Module) -> list[str]:
    """The paper's (every down block, the mid block, every up block), or the blocks of another network, outermost only.

    Raises UserError where there are none.
    """
    names = [name for name, _ in module.named_modules()]
    if own := [name for name in names if BLOCK.fullmatch(name)]:
        return sorted(own, key=lambda name: name.split(".")[0])  # down, mid, up, as in the forward
    if others := [name for name in names if _OTHER_BLOCK.fullmatch(name)]:
        return others
    raise UserError(f"a {type(module).__name__} has no blocks (down_blocks.0, transformer_blocks.0, blocks.0) to watch")


@contextmanager
def watched(module: nn.Module, where: Sequence[str], see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While it lasts, `see(k, output)` is told what place k gives: (b, channels, *positions)."""

    def hook(k: int) -> Callable[..., None]:
        return lambda part, inputs, output: see(k, hidden_states(part, output))

    handles = [module.get_submodule(name).register_forward_hook(hook(k)) for k, name in enumerate(where)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_states(block: nn.Module, output: Any) -> torch.Tensor:
    """What a block hands on of the image, channels second: of a tuple the first, or what comes after the text's
    states; of tokens (b, n, c) the transpose."""
    own: torch.Tensor = output
    if isinstance(output, tuple):
        own = output[1 if type(block).__name__ in TEXT_FIRST else 0]
    return wide(own).transpose(1, 2) if own.ndim == 3 else wide(own)


# -- sums -----------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    noise: FixedNoise, runs: Runs, base: nn.Module, models: Sequence[nn.Module], where: Sequence[str]
) -> list[list[Means]]:
    """Of each model by place: the means on the points of one subset. Even and odd images are the two halves."""
    sums: list[list[Means | None]] = [[None] * len(where) for _ in models]
    seen, counts = 0, np.zeros(2)
    for noised in noise.batches(runs, next(base.parameters()).device):
        half = (seen + torch.arange(len(noised.t))) % noise.num_images % 2
        seen, counts = seen + len(half), counts + np.bincount(half.numpy(), minlength=2)
        before: dict[int, torch.Tensor] = {}
        with watched(base, where, before.__setitem__):
            noise.denoiser.answer(base, noised)
        sizes = {k: _halves(output, half) for k, output in before.items()}
        for model, own in zip(models, sums, strict=True):
            with watched(model, where, _adding(own, before, sizes, half, where)):
                noise.denoiser.answer(model, noised)
    return [[one * (1 / counts[:, None, None]) for one in own if one is not None] for own in sums]


def _adding(
    own: list[Means | None],
    before: Mapping[int, torch.Tensor],
    sizes: Mapping[int, Array],
    half: torch.Tensor,
    where: Sequence[str],
) -> Callable[[int, torch.Tensor], None]:
    """Adds |F| and |F' - F| to the sums of one model as its blocks give F', so that no F' is kept."""

    def see(k: int, output: torch.Tensor) -> None:
        if output.shape != (was := before[k]).shape:
            ours, theirs = tuple(was.shape[1:]), tuple(output.shape[1:])
            raise UserError(f"{where[k]}: gives {theirs}, the base's {ours}: another architecture")
        more = Means(tuple(was.shape[2:]), sizes[k], _halves(output - was, half))
        own[k] = more if (held := own[k]) is None else held + more

    return see


def _halves(values: torch.Tensor, half: torch.Tensor) -> Array:
    """Sums of |values| (b, c, ...) over the samples of each half: (2, c, positions)."""
    sizes = values.abs().flatten(2)
    return np.stack([sizes[(half == h).to(sizes.device)].sum(0).double().cpu().numpy() for h in (0, 1)])


# -- variation ------------------------------------------------------------------------------------


def variations(means: Means, rounding: float = ROUNDING) -> Array:
    """(3 `KINDS`, 2): coefficients of variation along channels and along positions, with the sign of the variance that
    was estimated; NaN for what is rounding."""
    own = np.maximum(means.base, LEAST * means.base.mean())  # of each half, so that the halves stay independent
    relative = np.divide(means.change, own, out=np.zeros_like(means.change), where=own > 0)
    found = np.array([variation(halves, means.shape) for halves in (means.change, means.base, relative)])
    if means.change.mean() <= rounding * means.base.mean():
        found[[0, 2]] = np.nan
    return found


def variation(halves: Array, shape: Sequence[int]) -> tuple[float, float]:
    """Of means m(c, p) in two halves (2, C, P), positions of `shape`: sd(a_c) / m and sd(b_p) / m, with the sign of the
    variance that was estimated; NaN where m is 0 or an axis has one entry.

    Products of the halves stand for squares. Of positions it is the two-way layout's estimate.
    """
    _, c, p = halves.shape
    mean = halves.mean((1, 2), keepdims=True)
    rows, columns = halves.mean(2, keepdims=True) - mean, halves.mean(1, keepdims=True) - mean
    rest = halves - mean - rows - columns
    left = float(rest.prod(0).sum()) / max(1, (c - 1) * (p - 1))
    over_positions = float(columns.prod(0).sum()) / (p - 1) - left / c if p > 1 else np.nan
    return _root(_over_channels(halves, shape), mean.mean()), _root(over_positions, mean.mean())


def _over_channels(halves: Array, shape: Sequence[int]) -> float:
    """The variance of a_c: the mean covariance of channels' means over one half of the images and one outer third of
    space with those over the other half and the opposite third, along each axis of `shape` (P,); unbiased where the
    rest is alike no further than a third of space.
    """
    maps, products = halves.reshape(*halves.shape[:2], *shape), list[float]()
    for axis, length in enumerate(shape, start=2):
        if length > 1:
            third = max(1, round(length / 3))
            ends = [maps.take(range(*span), axis).reshape(*maps.shape[:2], -1).mean(2)
                    for span in ((third,), (length - third, length))]  # fmt: skip
            products += [_covariance(ends[0][0], ends[1][1]), _covariance(ends[0][1], ends[1][0])]
    alone = halves.mean(2)
    return float(np.mean(products)) if products else _covariance(alone[0], alone[1])


def _covariance(one: Array, other: Array) -> float:
    return float((one - one.mean()) @ (other - other.mean())) / (len(one) - 1) if len(one) > 1 else float("nan")


def _root(variance: float, mean: float) -> float:
    return _by(float(np.sign(variance) * np.sqrt(abs(variance))), mean)


def _by(value: float, by: float) -> float:
    return float(value / by) if by else float("nan")
