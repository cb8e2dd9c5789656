"""What a search may ask about merge weights. Only the search split is ever seen.

Weights are what `Materialise` takes: numbers, one an expert, or with others by pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.config import SamplerSettings
from deme_diffusion.data.splits import Split
from deme_diffusion.division import Runs, from_runs
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.extractors.base import Extractor
from deme_diffusion.evaluation.features import extract_real, features_of
from deme_diffusion.evaluation.metrics import frechet_distance, kernel_distance, statistics
from deme_diffusion.evaluation.sample import Prompts, sample_pixels
from deme_diffusion.models.denoiser import Denoiser, Noised
from deme_diffusion.models.objective import FixedNoise, Held, denoising_loss
from deme_diffusion.rng import generator

Array = npt.NDArray[np.float64]
Materialise = Callable[[Any], nn.Module]
"""Weights -> the merged module, ready to run."""
Turn = Callable[[], nn.Module]
"""Gives a module that may answer until the next one is asked for: several may be one and the same, changed."""
SECANT = 0.01
"""Step in a weight that a_i is measured over: the model bends at 1, and float32's rounding averages out."""
HELD_ANSWERS = 2**30
"""Bytes of batches and answers, about, that wait while one module takes the places of others."""
BACKWARD = 3.0
"""A gradient in forward passes: one, and the backward pass of about two."""


class Part(NamedTuple):
    """The images from `start` to `stop` in one draw."""

    draw: int
    start: int
    stop: int


class Derivative(Protocol):
    """How the merged model depends on the weights."""

    def prepare(self, weights: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """The merged module, and those of its tensors that depend on w, which want a gradient."""

    def pull_back(self, weights: Any, gradients: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, ...]]:
        """Pattern -> dL/dw (N,) from dL/dK of every tensor; '' for the weights without a pattern."""


def refuse_report(split: Held) -> None:
    """Raises UserError unless the split may be searched on: a search on what is reported is no evidence."""
    if split.name == "report":
        raise UserError("search: asked for the report split, which is only for the table; search on the search split")


@dataclass
class FrechetObjective:
    """FD between images sampled with common seeds, and prompts of the search split, and that split."""

    denoiser: Denoiser
    materialise: Materialise
    split: Split
    extractor: Extractor
    sampler: SamplerSettings
    seed: int
    num_images: int
    batch_size: int = 256
    prompts: Prompts = None

    def __post_init__(self) -> None:
        refuse_report(self.split)
        self.judge(extract_real(self.split, self.extractor).features)

    def judge(self, reference: npt.NDArray[np.floating[Any]]) -> None:
        """Keep what images are compared with: the search split's features (n, d)."""
        self.reference = statistics(reference)

    def value(self, weights: Any) -> float:
        """FD of the merged model."""
        return frechet_distance(statistics(self.features(weights)), self.reference)

    def features(self, weights: Any) -> npt.NDArray[np.floating[Any]]:
        """Of images of the merged model (n, d)."""
        pixels = sample_pixels(
            self.denoiser,
            self.materialise(weights),
            self.sampler,
            seed=self.seed,
            count=self.num_images,
            batch_size=self.batch_size,
            prompts=self.prompts,
        )
        return features_of(pixels, self.extractor)


@dataclass
class KernelObjective(FrechetObjective):
    """KID instead: it has no bias, so that images no more than their features can be compared by it."""

    def judge(self, reference: npt.NDArray[np.floating[Any]]) -> None:
        self.real = reference

    def value(self, weights: Any) -> float:
        """KID of the merged model."""
        return kernel_distance(self.features(weights), self.real, seed=self.seed)[0]


@dataclass
class FixedNoiseObjective:
    """The fixed-noise loss over [0, T): exactly, as a quadratic in w, and its gradient in w (METHOD.md section 8).

    To first order eps_{theta + sum w_i tau_i} = eps_theta + sum_i w_i a_i, with a_i = eps_theta_i - eps_theta. Ranges
    weigh by the timesteps they hold; `relative`: alike, each by its loss over the base's. A gradient's step takes
    `step_points` points, as many of each range, others every step, and at most `backward_batch` of them at once.
    `base` is the model at w = 0. Where the recipe fixes parameters that is not the base itself, which is `reference`.
    `in_turn`: base and experts in one module, while a block lasts; None: each is a module of its own.
    """

    noise: FixedNoise
    base: nn.Module
    experts: Sequence[Callable[[], nn.Module]]
    materialise: Materialise
    relative: bool = False
    derivative: Derivative | None = None
    step_points: int | None = None
    backward_batch: int | None = None
    reference: nn.Module | None = None
    in_turn: Callable[[], AbstractContextManager[Sequence[Turn]]] | None = None

    def __post_init__(self) -> None:
        refuse_report(self.noise.split)

    def value(self, weights: Any) -> float:
        """The loss of the merged model, or the mean over ranges of it over the base's."""
        losses = self.noise.losses(self.materialise(weights))
        if not self.relative:
            return self.noise.overall(losses)
        return float(np.mean(np.divide(losses, self._base_losses)))

    # -- least squares -----------------------------------------------------------------------------

    def equations_cost(self) -> float:
        """N + 1 forward passes a point."""
        return len(self.experts) + 1.0

    @torch.no_grad()
    def normal_equations(self, at: Sequence[float] | None = None) -> tuple[Array, Array]:
        """A_ij = E <a_i, a_j> and b_i = E <a_i, target - eps_theta>, N + 1 forwards a batch, ranges by their size.

        `at`: linearised there, so a_i = d eps / d w_i at those weights (by secants: forward-mode derivatives fail in
        diffusers' U-Nets, whose attention and group norm have none on strided tensors), and A w = b holds at the
        minimum of that model.
        """
        if at is None and self.in_turn is not None:
            with self.in_turn() as turns:
                return self._equations(turns, 1.0, HELD_ANSWERS)
        if at is None:
            modules = [self.base, *(load() for load in self.experts)]
            return self._equations([lambda module=module: module for module in modules], 1.0)  # type: ignore[misc]
        moved = [[w + SECANT * (i == j) for j, w in enumerate(at)] for i in range(len(at))]
        turns = [partial(self.materialise, weights) for weights in (list(at), *moved)]
        a, b = self._equations(turns, SECANT, HELD_ANSWERS)
        return a, b + a @ np.asarray(at, dtype=np.float64)

    def _equations(self, turns: Sequence[Turn], step: float, held: int = 0) -> tuple[Array, Array]:
        """A and b of the first module and those that are `step` away from it, each in its own weight.

        A module answers to as many batches at a time as `held` bytes allow, or to one.
        """
        count = len(turns) - 1
        a, b = np.zeros((count, count)), np.zeros(count)
        for batches in self._together(held, len(turns)):
            answers = [self._answers(turn(), [noised for noised, _ in batches]) for turn in turns]
            for (noised, share), *own in zip(batches, *answers, strict=True):
                predict = [answer.double().flatten() for answer in own]
                changes = (torch.stack(predict[1:]) - predict[0]) / step
                a += share * (changes @ changes.T).cpu().numpy()
                b += share * (changes @ (noised.target.double().flatten() - predict[0])).cpu().numpy()
        return a, b

    def _together(self, held: int, answers: int) -> Iterator[list[tuple[Noised, float]]]:
        """All batches with what a point of each counts, as many at a time as fit, with answers, into so many bytes."""
        device = next(self.base.parameters()).device
        points = self.noise.num_images * self.noise.settings.draws
        batches, size = list[tuple[Noised, float]](), 0
        for runs, weight in zip(self.noise.ranges, self._range_weights, strict=True):
            for noised in self.noise.batches(runs, device):
                batches.append((noised, weight / points))
                size += (answers + 2) * noised.x_t.nbytes + sum(told.nbytes for told in noised.condition.values())
                if size >= held:
                    yield batches
                    batches, size = [], 0
        if batches:
            yield batches

    def _answers(self, module: nn.Module, batches: Sequence[Noised]) -> list[torch.Tensor]:
        return [self.noise.denoiser.answer(module, noised) for noised in batches]

    # -- the gradient ------------------------------------------------------------------------------

    def gradient_cost(self, step: int | None = None) -> float:
        """A forward and a backward pass over the step's points."""
        return BACKWARD / (1 if step is None else self._steps)

    def gradient(self, weights: Any, step: int | None = None) -> tuple[float, dict[str, tuple[float, ...]]]:
        """The loss on the points of a step (of all where it is None) and its derivative in the weights, by pattern."""
        assert self.derivative is not None, "a gradient needs to know how the model depends on the weights"
        module, tensors = self.derivative.prepare(weights)
        total, sums = 0.0, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        for noised, share in self._chunks(step, next(self.base.parameters()).device):
            prediction = self.noise.denoiser.answer(module, noised)
            losses = denoising_loss(prediction, noised.target)
            loss = (losses * share.to(losses.device, losses.dtype)).sum()
            found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
            for name, gradient in zip(tensors, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient
            total += float(loss.detach())
        return total, self.derivative.pull_back(weights, sums)

    def _chunks(self, step: int | None, device: torch.device) -> Iterator[tuple[Noised, torch.Tensor]]:
        """Batches of a step's points, and what the loss of each point counts."""
        parts: list[Noised] = []
        shares: list[float] = []
        for runs, part, share in self._parts(step):
            if parts and len(shares) + part.stop - part.start > self._at_once:
                yield _joined(parts), torch.tensor(shares, dtype=torch.float64)
                parts, shares = [], []
            parts.append(self.noise.batch(runs, part.draw, part.start, part.stop, device))
            shares += [share] * (part.stop - part.start)
        yield _joined(parts), torch.tensor(shares, dtype=torch.float64)

    def _parts(self, step: int | None) -> Iterator[tuple[Runs, Part, float]]:
        """(range, images of one draw, what one of them counts), of every range and draw the step's share.

        Timesteps are stratified over the draws, so each step takes of all of them: as many images of each, others every
        step, until each was taken once.
        """
        for index, (runs, weight) in enumerate(zip(self.noise.ranges, self._range_weights, strict=True)):
            drawn = [Part(draw, *self._images(index, draw, step)) for draw in range(self.noise.settings.draws)]
            points = sum(part.stop - part.start for part in drawn)
            for part in drawn:
                for start in range(part.start, part.stop, self._at_once):
                    stop = min(start + self._at_once, part.stop)
                    yield runs, Part(part.draw, start, stop), weight / points

    def _images(self, index: int, draw: int, step: int | None) -> tuple[int, int]:
        """The images of one draw that a step takes in one range."""
        if step is None:
            return 0, self.noise.num_images
        epoch, place = divmod(step, self._steps)
        order = generator(self.noise.settings.seed, "gradient points", index, draw, epoch).permutation(self._steps)
        first, stop = (self.noise.num_images * edge // self._steps for edge in (order[place], order[place] + 1))
        return int(first), int(stop)

    @property
    def _at_once(self) -> int:
        return min(self.noise.batch_size, self.backward_batch or self.noise.batch_size)

    @cached_property
    def _steps(self) -> int:
        """Steps that take every point once."""
        points = len(self.noise.ranges) * self.noise.num_images * self.noise.settings.draws
        return min(self.noise.num_images, max(1, round(points / (self.step_points or points))))

    # -- ranges ------------------------------------------------------------------------------------

    @cached_property
    def _base_losses(self) -> list[float]:
        return self.noise.losses(self.reference or self.base)

    @cached_property
    def _range_weights(self) -> list[float]:
        """What the mean loss of a range counts."""
        if self.relative:
            return [1 / (len(self._base_losses) * loss) for loss in self._base_losses]
        sizes = [self.noise.denoiser.mass(from_runs(runs)) for runs in self.noise.ranges]
        return [size / sum(sizes) for size in sizes]


def _joined(parts: Sequence[Noised]) -> Noised:
    """Batches as one."""
    condition = {key: torch.cat([part.condition[key] for part in parts]) for key in parts[0].condition}
    x_t, t, target = (torch.cat([getattr(part, name) for part in parts]) for name in ("x_t", "t", "target"))
    return Noised(x_t, t, target, condition)
