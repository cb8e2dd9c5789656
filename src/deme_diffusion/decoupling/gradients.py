"""The gradients of one step, accumulated over its micro-batches."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from deme_diffusion.data.loading import Batch
from deme_diffusion.decoupling.multi_task import MultiTask
from deme_diffusion.decoupling.step import StepLosses, TrainStep
from deme_diffusion.rng import seed_of


def accumulated(
    accelerator: Accelerator,
    train_step: TrainStep,
    student: nn.Module,
    teacher: nn.Module | None,
    micro: list[Batch],
    weighing: MultiTask | None,
) -> list[StepLosses]:
    """Leave the gradients of one step in the parameters; its losses by micro-batch."""
    losses = []
    if weighing is not None:
        weighing.begin(micro[0]["step"], len(micro))
    for i, batch in enumerate(micro):
        # Dropout draws from the global generator: set anew for each micro-batch, it needs no place in a checkpoint.
        torch.manual_seed(seed_of(train_step.job.seed, "dropout", batch["step"], batch["first"]))
        syncing = i == len(micro) - 1
        with nullcontext() if syncing else accelerator.no_sync(student), accelerator.autocast():
            loss, record = train_step(student, teacher, batch)
        with nullcontext() if syncing else accelerator.no_sync(student):
            if loss.requires_grad:
                accelerator.backward(loss / len(micro))
        losses.append(record)
    if weighing is not None:
        weighing.finish()
    return losses
