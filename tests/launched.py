"""What `launch.py` runs in several processes: trainings in float64, and the command itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard

import deme_diffusion.pipeline.stages  # noqa: F401
from conftest import make_pico_denoiser
from deme_diffusion import cli
from deme_diffusion.config import AugmentSettings, DataSettings, DecoupleSettings, RuntimeSettings
from deme_diffusion.data.splits import load_splits
from deme_diffusion.decoupling import train as training
from deme_diffusion.decoupling.step import Job
from deme_diffusion.errors import MachineError
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.denoiser import Noised
from deme_diffusion.processes import count, is_main

torch.set_num_threads(1)


class Double(DDPM):
    """In double precision throughout."""

    def noised(self, batch: dict[str, Any], t: torch.Tensor, noise: torch.Tensor) -> Noised:
        return super().noised({**batch, "image": batch["image"].double()}, t, noise.double())


def train_double(folder: str, batch: int, options: dict[str, Any]) -> None:
    """Four steps with probabilistic sampling, consistency loss, projection, accumulation and EMA."""
    pico = make_pico_denoiser()
    denoiser = Double(pico.module.double(), pico.scheduler)
    settings = DecoupleSettings(
        train_batch_size=batch, gradient_accumulation_steps=2, processes=count(), ema_power=0.5, **options
    )
    job = Job(
        "expert 0", settings, [[0, 10]], 4, 1e-3, 5, global_prob=0.3, consistency_weight=1.0, projection="residual",
        timestep_sampling=settings.timestep_sampling, antithetic=settings.antithetic, teacher=settings.teacher,
        teacher_update_steps=settings.teacher_update_steps,
    )  # fmt: skip
    images = load_splits(DataSettings(augment=AugmentSettings(shift=1.0, flip=0.5)))["train"]
    training.train(denoiser, images, job, Path(folder), runtime=RuntimeSettings(device="cpu", checkpointing_steps=2))


def command(*arguments: str) -> None:
    """`deme ARGUMENTS`."""
    sys.argv = ["deme", *arguments]
    cli.main()


def command_on_a_full_disk(*arguments: str) -> None:
    """The same, but no checkpoint can be written, which only the main process notices."""

    def full(*rest: Any, **options: Any) -> None:
        raise MachineError("checkpoint: no space left on device")

    if is_main():
        training.checkpoints.save = full
    command(*arguments)


def run_from_python(recipe: str, out: str) -> None:
    """`deme_diffusion.run`, whose result every process gets."""
    from deme_diffusion import run

    result = run(recipe, "decouple.train_batch_size=2", out=out)
    print(json.dumps([str(result.folder), len(result.table)]))
