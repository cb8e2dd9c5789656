"""Sampling with any diffusers scheduler: a seed an image, exactly n images, resumed by image index."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.config import SamplerSettings
from deme_diffusion.data.splits import to_pixels
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.conditional import Seen, generated, refusals, unseen
from deme_diffusion.evaluation.reducing import reduced_to, size_at
from deme_diffusion.evaluation.samplers import check_sampler, sampler_options
from deme_diffusion.files import explained, write_json
from deme_diffusion.models.denoiser import Denoiser, Prompt
from deme_diffusion.rng import seed_of

IMAGES, CURSOR = "images.npy", "work/sampled.json"
Prompts = Sequence[Prompt] | None
"""What each image is asked for by; None where the model takes nothing."""


def image_seeds(seed: int, first: int, count: int) -> list[int]:
    """Seeds of the images first, first + 1, ...: each image has its own, whatever batch it falls into."""
    return [seed_of(seed, "image", index) for index in range(first, first + count)]


def make_scheduler(denoiser: Denoiser, settings: SamplerSettings) -> Any:
    """A fresh sampler on the checkpoint's own noise schedule. UserError for one that cannot be had, or not so."""
    import diffusers

    family = getattr(denoiser, "family", "ddpm")
    check_sampler(settings, denoiser.num_train_timesteps, key="sampler", family=family)
    options = sampler_options(settings, denoiser.scheduler.config, family=family)
    with refusals(settings):
        scheduler = getattr(diffusers, settings.name).from_config(denoiser.scheduler.config, **options)
        shifted = getattr(scheduler.config, "use_dynamic_shifting", False)
        # By the length of an image's sequence, which the pipeline knows: it sets them again.
        mu = {"mu": 1.0} if shifted and "mu" in inspect.signature(scheduler.set_timesteps).parameters else {}
        scheduler.set_timesteps(settings.num_inference_steps, **mu)
    return scheduler


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    module: nn.Module,
    settings: SamplerSettings,
    seeds: Sequence[int],
    *,
    prompts: Prompts = None,
    seen: Seen = unseen,
) -> torch.Tensor:
    """One batch (len(seeds), c, h, w) in [-1, 1]. The noise of an image depends on its seed alone.

    The image of a seed is that of a stock pipeline in float32 with batch 1 and `torch.Generator().manual_seed(seed)`.
    """
    scheduler = make_scheduler(denoiser, settings)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if denoiser.takes != "nothing":
        return generated(denoiser, module, settings, scheduler, generators, prompts, seen)
    device = next(module.parameters()).device
    noise = [torch.randn(denoiser.sample_shape, generator=generator) for generator in generators]
    x: torch.Tensor = torch.stack(noise).to(device) * scheduler.init_noise_sigma
    accepted = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in (("eta", settings.eta), ("generator", generators)) if key in accepted}
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t)
        prediction = denoiser.predict(module, x_t, t.to(device), {})
        seen(t, x_t, prediction)
        with refusals(settings):
            x = scheduler.step(prediction, t, x, **options).prev_sample
    return x


def sample_pixels(
    denoiser: Denoiser,
    module: nn.Module,
    settings: SamplerSettings,
    *,
    seed: int,
    count: int,
    batch_size: int,
    prompts: Prompts = None,
) -> npt.NDArray[np.uint8]:
    """Exactly `count` images (count, h, w, c) in memory: what a search scores, and previews show."""
    batches = []
    for first in range(0, count, batch_size):
        seeds = image_seeds(seed, first, min(batch_size, count - first))
        asked = of_batch(prompts, first, len(seeds))
        batches.append(sample_batch(denoiser, module, settings, seeds, prompts=asked))
    return np.concatenate(batches)


def of_batch(prompts: Prompts, first: int, count: int) -> Prompts:
    """Those of the images first, first + 1, ..."""
    return None if prompts is None else prompts[first : first + count]


def sample_to(
    folder: Path,
    denoiser: Denoiser,
    module: nn.Module,
    settings: SamplerSettings,
    *,
    seed: int,
    count: int,
    batch_size: int,
    prompts: Prompts = None,
    side: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Exactly `count` images into `folder/images.npy` (uint8, (count, h, w, c)), going on after the last batch.

    `side`: the shorter side of larger images is reduced to it (`evaluation.reducing`).
    """
    seeds = image_seeds(seed, 0, count)
    options: dict[str, Any] = {"batch_size": batch_size, "side": side, "progress": progress}
    sample_seeds_to(folder, denoiser, module, settings, seeds, prompts=prompts, **options)


def sample_seeds_to(
    folder: Path,
    denoiser: Denoiser,
    module: nn.Module,
    settings: SamplerSettings,
    seeds: Sequence[int],
    *,
    batch_size: int,
    prompts: Prompts = None,
    side: int | None = None,
    cursor_name: str = CURSOR,
    begin: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """An image for each seed, in their order, into `folder/images.npy`, as `sample_to`.

    The folder is touched, after `begin`, only once a first batch is there: what a sampler refuses leaves nothing.
    """
    path, cursor, count = folder / IMAGES, folder / cursor_name, len(seeds)
    channels, *size = denoiser.image_shape
    shape = (count, *size_at(tuple(size), side), channels)
    done = _resume_at(path, cursor, shape)
    images: Any = None
    for first in range(done, count, batch_size):
        asked = of_batch(prompts, first, batch_size)
        batch = sample_batch(denoiser, module, settings, seeds[first : first + batch_size], prompts=asked)
        if images is None:
            begin()
            images = _array(path, shape, new=not done)
        images[first : first + len(batch)] = reduced_to(batch, side)
        images.flush()
        write_json(cursor, {"done": first + len(batch)})
        progress(first + len(batch))


def _array(path: Path, shape: tuple[int, ...], *, new: bool) -> Any:
    """A memory map of images, new or as it is."""
    images = np.lib.format.open_memmap(path, mode="w+" if new else "r+", dtype=np.uint8, shape=shape)
    with explained("write", path), path.open("r+b") as file:
        # Writing through a memory map to a full disk kills the process: the blocks are asked for beforehand.
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return images


def sample_batch(
    denoiser: Denoiser,
    module: nn.Module,
    settings: SamplerSettings,
    seeds: Sequence[int],
    *,
    prompts: Prompts = None,
    seen: Seen = unseen,
) -> npt.NDArray[np.uint8]:
    """One batch of images (len(seeds), h, w, c). UserError where one is not finite."""
    batch = sample(denoiser, module, settings, seeds, prompts=prompts, seen=seen)
    if not torch.isfinite(batch).all():
        raise UserError(f"{settings.label}: the model samples non-finite images; look at its training or weights")
    return to_pixels(batch)


def _resume_at(path: Path, cursor: Path, shape: tuple[int, ...]) -> int:
    """How many images are done; 0 where the file is not whole, or not of that shape."""
    try:
        there = np.load(path, mmap_mode="r")  # refuses a file that is too short, which r+ would fill up with zeros
        return int(json.loads(cursor.read_text())["done"]) if there.shape == shape else 0
    except (OSError, ValueError, KeyError):
        return 0
