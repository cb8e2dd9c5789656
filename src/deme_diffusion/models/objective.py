"""The losses of Eq. 2, 4 and 5, per sample; and the fixed-noise loss per range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from deme_diffusion.config import LossSettings
from deme_diffusion.data.sources import SplitName
from deme_diffusion.division import Runs, from_runs
from deme_diffusion.models.denoiser import Denoiser, Noised, on_device
from deme_diffusion.models.precision import wide
from deme_diffusion.rng import generator, normals


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """|| eps - eps_theta(x_t, t) ||^2 of each sample, as a mean over its elements: (b, ...) -> (b,). Eq. 2."""
    return (wide(prediction) - wide(target)).square().flatten(1).mean(1)


def consistency_loss(prediction: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """|| eps_theta(x_t, t) - eps_theta_i(x_t, t) ||^2 of each sample, to the frozen teacher: (b,). Eq. 4."""
    return denoising_loss(prediction, teacher.detach())


class Held(Protocol):
    """Held-out images: `data.splits.Split`, or one that was encoded beforehand."""

    @property
    def name(self) -> SplitName: ...

    def __len__(self) -> int: ...

    def view_batch(self, view: int, start: int = 0, stop: int | None = None) -> dict[str, Any]: ...


@dataclass(frozen=True)
class FixedNoise:
    """Held-out images at fixed timesteps and noise: the same points for every model, so that losses compare paired.

    `ranges` are subsets that do not overlap. Every image is drawn `draws` times in each (stratified within it, another
    view of the image each time); the points of a range depend on its timesteps, not on its place in the list.
    """

    denoiser: Denoiser
    split: Held
    ranges: list[Runs]
    settings: LossSettings
    batch_size: int = 256

    @property
    def num_images(self) -> int:
        """Images that the loss is taken on; each gives `draws` points a range."""
        return min(len(self.split), self.settings.num_images or len(self.split))

    def batches(self, runs: Runs, device: torch.device) -> Iterator[Noised]:
        """The noised batches of one range."""
        for draw in range(self.settings.draws):
            for i in range(0, self.num_images, self.batch_size):
                yield self.batch(runs, draw, i, min(i + self.batch_size, self.num_images), device)

    def batch(self, runs: Runs, draw: int, start: int, stop: int, device: torch.device) -> Noised:
        """One draw of the images from `start` to `stop` in one range."""
        subset, seed, key = from_runs(runs), self.settings.seed, repr(runs)
        jitter = generator(seed, "fixed-t", key, draw).random(self.num_images)
        t = torch.from_numpy(self.denoiser.timesteps(subset, (draw + jitter) / self.settings.draws))
        batch = on_device(self.split.view_batch(draw, start, stop), device)
        noise = torch.from_numpy(normals(seed, f"fixed {key}", draw, start, stop - start, self.denoiser.sample_shape))
        return self.denoiser.noised(batch, t[start:stop].to(device), noise.to(device))

    def losses(self, module: nn.Module) -> list[float]:
        """Mean denoising loss of a module in each range."""
        return [float(points.mean()) for points in self.points(module)]

    def points(self, module: nn.Module) -> list[torch.Tensor]:
        """The denoising loss at every point of each range, float64: (draws * num_images,), draw by draw."""
        device = next(module.parameters()).device
        return [self._points(module, self.batches(runs, device)) for runs in self.ranges]

    def overall(self, losses: list[float]) -> float:
        """The loss over all ranges together: each weighted by the share of draws of t that falls into it."""
        sizes = [self.denoiser.mass(from_runs(runs)) for runs in self.ranges]
        return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)

    @torch.no_grad()
    def _points(self, module: nn.Module, batches: Iterator[Noised]) -> torch.Tensor:
        losses = [denoising_loss(self.denoiser.answer(module, noised), noised.target) for noised in batches]
        return torch.cat(losses).double()
