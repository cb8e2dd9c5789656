"""One micro-batch of Eq. 5: draws, student and teacher, losses by range, and how they are combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import nn

from deme_diffusion.config import TrainSettings
from deme_diffusion.data.loading import Batch
from deme_diffusion.decoupling.initial import PRETRAINED, Start
from deme_diffusion.decoupling.timesteps import Timesteps, draw_timesteps
from deme_diffusion.division import Runs, from_runs, owners, reported
from deme_diffusion.models.denoiser import Denoiser, Noised, on_device
from deme_diffusion.models.lora import LowRank
from deme_diffusion.models.objective import consistency_loss, denoising_loss
from deme_diffusion.models.weighting import timestep_weights


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
    projection_axes: str = "channel"
    start: Start = PRETRAINED
    timestep_sampling: Literal["per_sample", "per_batch"] = "per_sample"
    antithetic: bool = False
    teacher: Literal["frozen", "ema"] = "frozen"
    teacher_update_steps: int = 500
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    multi_task: Literal["none", "uncertainty", "nash"] = "none"
    multi_task_clusters: int = 5
    multi_task_division: Literal["uniform", "log_snr"] = "uniform"
    multi_task_update_steps: int = 25
    lora: LowRank | None = None
    """Adapters are trained, and the base stays as it is; None: all of its weights are."""

    @property
    def teacher_precision(self) -> torch.dtype | None:
        """The dtype that the teacher is held and run in; None: as the base is."""
        return None if self.teacher_dtype == "float32" else getattr(torch, self.teacher_dtype)


class Combine(Protocol):
    """How the losses of the ranges become one loss; a multi-task method (`multi_task`) puts its own here.

    In several processes each combines the losses of its own samples, and their gradients are averaged.
    """

    def __call__(self, losses: dict[int, torch.Tensor]) -> torch.Tensor:
        """{range: its share of the batch's mean loss} -> the scalar to differentiate, or one that needs no gradient.

        The latter says that it has taken the gradients itself. A range of which nothing was drawn is not among them.
        """


def total(losses: dict[int, torch.Tensor]) -> torch.Tensor:
    """The plain sum: the mean loss over the batch."""
    return torch.stack(list(losses.values())).sum()


@dataclass
class StepLosses:
    """Losses of one micro-batch, per sample and detached, with the range each sample fell in (on the CPU)."""

    loss: torch.Tensor
    denoising: torch.Tensor
    consistency: torch.Tensor
    owner: torch.Tensor

    def by_range(self) -> dict[int, float]:
        """Mean denoising loss in each range that was drawn."""
        return {int(r): float(self.denoising[self.owner == r].mean()) for r in torch.unique(self.owner)}


class TrainStep:
    """Callable: micro-batch -> (scalar to differentiate, losses). Holds what stays equal over the steps.

    Nothing here waits for the device: which range a sample falls in is known on the CPU, where t is drawn. `combine` is
    handed the losses of the reported ranges, or of `tasks`: the task of each timestep, (T,).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        job: Job,
        device: torch.device,
        combine: Combine = total,
        processes: int = 1,
        tasks: Timesteps | None = None,
    ) -> None:
        self.denoiser, self.job, self.device, self.combine = denoiser, job, device, combine
        self.subset = from_runs(job.subset)
        self.batch = processes * job.settings.train_batch_size if job.timestep_sampling == "per_batch" else None
        total_steps = denoiser.num_train_timesteps
        self.owners = owners(reported(job.subset, total_steps), total_steps)
        self.tasks = self.owners if tasks is None else tasks
        weights = timestep_weights(job.settings, denoiser)
        self.weights = None if weights is None else weights.float().to(device)

    def __call__(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> tuple[torch.Tensor, StepLosses]:
        job, where = self.job, {"step": batch["step"], "first": batch["first"]}
        batch = on_device(batch, self.device)
        noise = batch["noise"]
        drawn = draw_timesteps(
            self.denoiser, self.subset, global_prob=job.global_prob, seed=job.seed, count=len(noise),
            batch=self.batch, antithetic=job.antithetic, **where,
        )  # fmt: skip
        t = torch.from_numpy(drawn).to(self.device, non_blocking=True)
        noised = self.denoiser.noised(batch, t, noise)

        # The teacher before the student, whose activations would be in its way: 5% of a small model's step.
        answer = None if teacher is None else self._answer(teacher, noised)
        prediction = self.denoiser.answer(student, noised)
        denoising = denoising_loss(prediction, noised.target)
        consistency = torch.zeros_like(denoising) if answer is None else consistency_loss(prediction, answer)

        loss = denoising + job.consistency_weight * consistency  # Eq. 5
        if self.weights is not None:
            loss = loss * self.weights[t]
        owner, task = self.owners[drawn], self.tasks[drawn]
        shares = {int(k): loss[self._where(task == k)].sum() / len(loss) for k in np.unique(task)}
        record = StepLosses(loss.detach(), denoising.detach(), consistency.detach(), torch.from_numpy(owner))
        return self.combine(shares), record

    def _where(self, mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> torch.Tensor:
        return torch.from_numpy(np.flatnonzero(mask)).to(self.device, non_blocking=True)

    @torch.no_grad()
    def _answer(self, teacher: nn.Module, noised: Noised) -> torch.Tensor:
        """The teacher's prediction, in the precision that it is held in."""
        return self.denoiser.answer(teacher, noised)
