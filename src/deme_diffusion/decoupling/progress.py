"""Where a training stands, and how it goes into a checkpoint and comes back out of one."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from deme_diffusion.decoupling.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer
from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.multi_task import MultiTask
from deme_diffusion.decoupling.student import load_state_of, state_of
from deme_diffusion.decoupling.teacher import Averaged

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a checkpoint remembers beside tensors."""

    step: int = 0
    updates: int = 0
    skipped_in_a_row: int = 0
    stale_validations: int = 0
    best_step: int = -1
    best_loss: float = math.inf
    environment: dict[str, Any] = field(default_factory=dict)


def snapshot(
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: Any,
    ema: Ema | None,
    teacher: Averaged | None,
    progress: Progress,
    weighing: MultiTask | None = None,
) -> Checkpoint:
    """All that a resumed training needs to take the very next step."""
    parts = {
        "model": state_of(accelerator.unwrap_model(student)),
        "optimizer": flatten_optimizer(optimizer),
        "ema": ema.state() if ema else {},
        "teacher": teacher.state() if teacher else {},
        "multi_task": weighing.state() if weighing else {},
    }
    tensors = {f"{part}/{key}": value for part, state in parts.items() for key, value in state.items()}
    record = {**vars(progress), "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}
    record["best_loss"] = progress.best_loss if math.isfinite(progress.best_loss) else None
    return Checkpoint(progress.step, tensors, record)


def restore(
    saved: Checkpoint,
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: Any,
    ema: Ema | None,
    teacher: Averaged | None,
    environment: dict[str, Any],
    weighing: MultiTask | None = None,
) -> Progress:
    """Put a checkpoint back; what exactness is relative to (versions, device, threads) is compared, and said."""
    load_state_of(accelerator.unwrap_model(student), saved.part("model"))
    restore_optimizer(optimizer, saved.part("optimizer"))
    record = {key: saved.record[key] for key in Progress.__dataclass_fields__}
    record["best_loss"] = math.inf if record["best_loss"] is None else record["best_loss"]
    progress = Progress(**record)
    if ema:
        ema.restore(saved.part("ema"), progress.updates)
    if teacher:
        teacher.restore(saved.part("teacher"))
    if weighing:
        weighing.restore(saved.part("multi_task"))
    if accelerator.scaler is not None and saved.record["scaler"]:
        accelerator.scaler.load_state_dict(saved.record["scaler"])
    for key, before in progress.environment.items():
        if (now := environment.get(key)) != before:
            log.warning("resumed with %s %s instead of %s: the result may differ in the last bits", key, now, before)
    progress.environment = environment
    return progress


def environment_of(accelerator: Accelerator) -> dict[str, Any]:
    """What exactness is relative to."""
    device = accelerator.device
    return {
        **{name: metadata.version(name) for name in ("torch", "diffusers", "accelerate", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
