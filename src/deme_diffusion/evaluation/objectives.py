"""What a search may ask about merge weights. Only the search split is ever seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.config import SamplerSettings
from deme_diffusion.data.splits import Split
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.extractors.base import Extractor
from deme_diffusion.evaluation.features import extract_real, features_of
from deme_diffusion.evaluation.metrics import frechet_distance, statistics
from deme_diffusion.evaluation.sample import sample_pixels
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.objective import FixedNoise

Array = npt.NDArray[np.float64]
Materialise = Callable[[Sequence[float]], nn.Module]
"""Weights -> the merged module, ready to run."""


def refuse_report(split: Split) -> None:
    """Raises UserError unless the split may be searched on: a search on what is reported is no evidence."""
    if split.name == "report":
        raise UserError("search: asked for the report split, which is only for the table; search on the search split")


@dataclass
class FrechetObjective:
    """FD between images sampled with common seeds and the search split."""

    denoiser: Denoiser
    materialise: Materialise
    split: Split
    extractor: Extractor
    sampler: SamplerSettings
    seed: int
    num_images: int
    batch_size: int = 256

    def __post_init__(self) -> None:
        refuse_report(self.split)
        self.reference = statistics(extract_real(self.split, self.extractor).features)

    def value(self, weights: Sequence[float]) -> float:
        """FD of the merged model."""
        pixels = sample_pixels(
            self.denoiser,
            self.materialise(weights),
            self.sampler,
            seed=self.seed,
            count=self.num_images,
            batch_size=self.batch_size,
        )
        return frechet_distance(statistics(features_of(pixels, self.extractor)), self.reference)


@dataclass
class FixedNoiseObjective:
    """The fixed-noise loss over [0, T), exactly and as a quadratic in w (METHOD.md section 8).

    To first order eps_{theta + sum w_i tau_i} = eps_theta + sum_i w_i a_i, with a_i = eps_theta_i - eps_theta.
    """

    noise: FixedNoise
    base: nn.Module
    experts: Sequence[Callable[[], nn.Module]]
    materialise: Materialise

    def __post_init__(self) -> None:
        refuse_report(self.noise.split)

    def value(self, weights: Sequence[float]) -> float:
        """The loss of the merged model."""
        return self.noise.overall(self.noise.losses(self.materialise(weights)))

    @torch.no_grad()
    def normal_equations(self) -> tuple[Array, Array]:
        """A_ij = E <a_i, a_j> and b_i = E <a_i, target - eps_theta>, N + 1 forwards a batch, ranges by their size."""
        experts = [load() for load in self.experts]
        a, b = np.zeros((len(experts), len(experts))), np.zeros(len(experts))
        device = next(self.base.parameters()).device
        sizes = [sum(hi - lo for lo, hi in runs) for runs in self.noise.ranges]
        for runs, size in zip(self.noise.ranges, sizes, strict=True):
            points = self.noise.num_images * self.noise.settings.draws
            share = size / sum(sizes) / points
            for noised in self.noise.batches(runs, device):
                predict = [
                    self.noise.denoiser.predict(module, noised.x_t, noised.t, noised.condition).double().flatten()
                    for module in (self.base, *experts)
                ]
                changes = torch.stack(predict[1:]) - predict[0]
                a += share * (changes @ changes.T).cpu().numpy()
                b += share * (changes @ (noised.target.double().flatten() - predict[0])).cpu().numpy()
        return a, b
