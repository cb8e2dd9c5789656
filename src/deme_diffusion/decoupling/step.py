"""One micro-batch of Eq. 5: draws, student and teacher, losses by range, and how they are combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from deme_diffusion.config import TrainSettings
from deme_diffusion.data.loading import Batch
from deme_diffusion.decoupling.timesteps import draw_timesteps
from deme_diffusion.division import Runs, from_runs, owners, reported
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.objective import consistency_loss, denoising_loss, min_snr_weights


@dataclass(frozen=True)
class Job:
    """What one training is: an expert, a control on all timesteps, or a base (no teacher)."""

    name: str
    settings: TrainSettings
    subset: Runs
    steps: int
    learning_rate: float
    seed: int
    global_prob: float = 0.0
    consistency_weight: float = 0.0
    projection: str = "none"


class Combine(Protocol):
    """How the losses of the ranges become one loss; a multi-task method puts its own here."""

    def __call__(self, losses: dict[int, torch.Tensor]) -> torch.Tensor:
        """{range: its share of the batch's mean loss} -> the scalar to differentiate."""


def total(losses: dict[int, torch.Tensor]) -> torch.Tensor:
    """The plain sum: the mean loss over the batch."""
    return torch.stack(list(losses.values())).sum()


@dataclass
class StepLosses:
    """Losses of one micro-batch, per sample and detached, with the range each sample fell in."""

    loss: torch.Tensor
    denoising: torch.Tensor
    consistency: torch.Tensor
    owner: torch.Tensor

    def by_range(self) -> dict[int, float]:
        """Mean denoising loss in each range that was drawn."""
        return {int(r): float(self.denoising[self.owner == r].mean()) for r in torch.unique(self.owner)}


class TrainStep:
    """Callable: micro-batch -> (scalar to differentiate, losses). Holds what stays equal over the steps."""

    def __init__(self, denoiser: Denoiser, job: Job, device: torch.device, combine: Combine = total) -> None:
        self.denoiser, self.job, self.device, self.combine = denoiser, job, device, combine
        self.subset = from_runs(job.subset)
        total_steps = denoiser.num_train_timesteps
        self.owners = torch.from_numpy(owners(reported(job.subset, total_steps), total_steps)).to(device)
        gamma = job.settings.snr_gamma
        weights = None if gamma is None else min_snr_weights(denoiser.snr(), gamma, denoiser.prediction_type)
        self.weights = None if weights is None else weights.float().to(device)

    def __call__(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> tuple[torch.Tensor, StepLosses]:
        job, where = self.job, {"step": batch["step"], "first": batch["first"]}
        images, noise = (batch[key].to(self.device, non_blocking=True) for key in ("image", "noise"))
        drawn = draw_timesteps(
            self.denoiser, self.subset, global_prob=job.global_prob, seed=job.seed, count=len(images), **where
        )
        t = torch.from_numpy(drawn).to(self.device)
        noised = self.denoiser.noised({**batch, "image": images}, t, noise)

        answer = None
        if teacher is not None:  # before the student, whose activations would be in its way: 5% of a small model's step
            with torch.no_grad():
                answer = self.denoiser.predict(teacher, noised.x_t, noised.t, noised.condition)
        prediction = self.denoiser.predict(student, noised.x_t, noised.t, noised.condition)
        denoising = denoising_loss(prediction, noised.target)
        consistency = torch.zeros_like(denoising) if answer is None else consistency_loss(prediction, answer)

        loss = denoising + job.consistency_weight * consistency  # Eq. 5
        if self.weights is not None:
            loss = loss * self.weights[t]
        owner = self.owners[t]
        shares = {int(r): loss[owner == r].sum() / len(loss) for r in torch.unique(owner)}
        return self.combine(shares), StepLosses(loss.detach(), denoising.detach(), consistency.detach(), owner)
