"""LoRA experts as tests train and compare them: a tiny Stable Diffusion, its digits, and random factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deme_diffusion.config import DecoupleSettings, LossSettings, RuntimeSettings
from deme_diffusion.data.splits import Split
from deme_diffusion.decoupling.step import Job, total
from deme_diffusion.decoupling.train import train
from deme_diffusion.division import reported
from deme_diffusion.lora import Factors, save_lora
from deme_diffusion.lora_files import LORA_NAME
from deme_diffusion.models.lora import LowRank, layers_for
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.models.stable_diffusion import StableDiffusion
from deme_diffusion.rng import generator

LORA = LowRank(2, alpha=3.0)


def job(steps: int = 4, *, lora: LowRank | None = LORA, seed: int = 0, **settings: Any) -> Job:
    """A training of the first half of 20 timesteps, with a teacher."""
    own = {"train_batch_size": 2, "validation_steps": 2, "projection": "none", **settings}
    rate = own.pop("learning_rate", 1e-2)
    chosen = DecoupleSettings(**own)
    return Job("e", chosen, [[0, 10]], steps, rate, seed, global_prob=0.3, consistency_weight=1.0, lora=lora)


def trained(
    base: Path, images: Split, folder: Path, asked: Job | None = None, *, combine: Any = total, **runtime: Any
) -> StableDiffusion:
    """The denoiser after a training into `folder`."""
    return trained_on(StableDiffusion.load(base), images, folder, asked, combine=combine, **runtime)


def trained_on(
    denoiser: StableDiffusion,
    images: Split,
    folder: Path,
    asked: Job | None = None,
    *,
    combine: Any = total,
    **runtime: Any,
) -> StableDiffusion:
    """The same, of a denoiser that is open already."""
    asked = asked or job()
    held = replace(images, indices=images.indices[:4])
    validation = FixedNoise(denoiser, held, reported(asked.subset, 20), LossSettings(draws=1))
    settings = RuntimeSettings(device="cpu", **{"checkpointing_steps": 2, "checkpoints_total_limit": 4, **runtime})
    train(denoiser, images, asked, folder, runtime=settings, validation=validation, combine=combine)
    return denoiser


def random_factors(
    module: nn.Module, rank: int, seed: int, targets: tuple[str, ...] | None = None, scale: float = 0.5
) -> dict[str, Factors]:
    """Layer -> factors of some layers, or of those that are adapted by default."""
    found = {}
    for name in layers_for(module, targets):
        weight: Any = module.get_submodule(name).weight
        draw = generator(seed, name)
        down = torch.from_numpy(draw.standard_normal((rank, *weight.shape[1:]), dtype="float32"))
        up = torch.from_numpy(draw.standard_normal((len(weight), rank), dtype="float32"))
        found[name] = Factors(down, up.reshape(len(weight), rank, *(1 for _ in weight.shape[2:])), scale)
    return found


def saved(folder: Path, layers: Mapping[str, Factors], component: str = "unet", **more: Any) -> Path:
    """A LoRA's folder."""
    save_lora(folder / LORA_NAME, component, layers, **more)
    return folder


def inputs(seed: int = 0, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the tiny Stable Diffusion's U-Net takes."""
    draw = torch.Generator().manual_seed(seed)
    x, states = torch.randn(count, 4, 4, 4, generator=draw), torch.randn(count, 12, 16, generator=draw)
    return x, torch.arange(count) * 7, states


@torch.no_grad()
def answered(module: nn.Module, seed: int = 0) -> torch.Tensor:
    """Its prediction on them."""
    found: torch.Tensor = module(*inputs(seed), return_dict=False)[0]
    return found
