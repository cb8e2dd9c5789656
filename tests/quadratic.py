"""A component whose prediction is linear in its parameters, so that its loss is a quadratic known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from conftest import T, make_pico_denoiser
from deme_diffusion.config import DataSettings, LossSettings
from deme_diffusion.data.splits import load_splits
from deme_diffusion.division import Runs, from_runs
from deme_diffusion.models.objective import FixedNoise

Array = npt.NDArray[np.float64]
RANGES: list[Runs] = [[[0, 5]], [[5, T]]]
SHAPES: dict[str, tuple[int, ...]] = {"weight": (3, 2), "bias": (3,)}
SIZE = 9


class Linear(nn.Module):
    """Predicts sum_k p_k B_k, the same image for every input, whatever the order in which it holds its parameters."""

    def __init__(self, parameters: Mapping[str, Array]) -> None:
        super().__init__()
        for name, values in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(np.asarray(values, np.float64))))
        self.calls, self.config = 0, SimpleNamespace(in_channels=1, sample_size=8)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        self.calls += 1
        held = dict(self.named_parameters())
        image = torch.cat([held[name].flatten() for name in SHAPES]) @ torch.from_numpy(patterns())
        return (image.reshape(1, 1, 8, 8).expand(len(x_t), -1, -1, -1),)


@cache
def patterns() -> Array:
    """B, (9, 64): nine images, neither orthogonal nor of one length."""
    return np.random.default_rng(5).standard_normal((SIZE, 64)) * np.linspace(0.5, 2.0, SIZE)[:, None]


def at(*, seed: int, scale: float = 1.0) -> Array:
    """A point (9,), or a task vector."""
    return scale * np.random.default_rng(seed).standard_normal(SIZE)


def module_at(point: Array) -> Linear:
    """The component with these parameters."""
    weight, bias = np.split(point, [6])
    return Linear({"weight": weight.reshape(3, 2), "bias": bias})


def loads(base: Array, *vectors: Array) -> list[Callable[[], nn.Module]]:
    """Models at base + vector, as figures are given them."""
    return [lambda vector=vector: module_at(base + vector) for vector in vectors]  # type: ignore[misc]


class Known:
    """The loss in each range as a function of the nine parameters."""

    def __init__(self, noise: FixedNoise) -> None:
        self.sizes = [len(from_runs(runs)) for runs in noise.ranges]
        self.targets = [self._targets(noise, runs) for runs in noise.ranges]

    @staticmethod
    def _targets(noise: FixedNoise, runs: Runs) -> Array:
        batches = noise.batches(runs, torch.device("cpu"))
        return torch.cat([noised.target for noised in batches]).double().flatten(1).numpy()

    def losses(self, point: Array) -> list[float]:
        """mean || p B - eps ||^2 over the points of each range."""
        return [float(((point @ patterns() - targets) ** 2).mean()) for targets in self.targets]

    def overall(self, point: Array) -> float:
        """Over all timesteps."""
        return float(np.average(self.losses(point), weights=self.sizes))


def noise_around(base: nn.Module, ranges: list[Runs] = RANGES) -> FixedNoise:
    """Six images in each range, and `base` as the pretrained model."""
    denoiser = make_pico_denoiser()
    denoiser.module = base
    split = load_splits(DataSettings())["train"]
    few = replace(split, indices=split.indices[:6])
    return FixedNoise(denoiser, few, ranges, LossSettings(num_images=6, draws=1), 4)
