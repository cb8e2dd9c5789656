"""Sampling with any diffusers scheduler: a seed an image, exactly n images, resumed by image index."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deme_diffusion.config import SamplerSettings
from deme_diffusion.data.splits import to_pixels
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.samplers import check_sampler
from deme_diffusion.files import explained, write_json
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.rng import seed_of

IMAGES, CURSOR = "images.npy", "work/sampled.json"
Seen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Looks at one step of a sampler: t (), what the model gets at t, and what it predicts (both (b, c, h, w))."""


def image_seeds(seed: int, first: int, count: int) -> list[int]:
    """Seeds of the images first, first + 1, ...: each image has its own, whatever batch it falls into."""
    return [seed_of(seed, "image", index) for index in range(first, first + count)]


def make_scheduler(denoiser: Denoiser, settings: SamplerSettings) -> Any:
    """A fresh sampler on the checkpoint's own noise schedule. UserError for one that cannot be had, or not so."""
    import diffusers

    check_sampler(settings, denoiser.num_train_timesteps, key="sampler")
    options: dict[str, Any] = {}
    if settings.timestep_spacing is not None:
        options["timestep_spacing"] = settings.timestep_spacing
    if settings.name == "DPMSolverSinglestepScheduler":
        options["lower_order_final"] = True  # diffusers turns it on in any case, with a warning at every batch
    with _refusals(settings):
        scheduler = getattr(diffusers, settings.name).from_config(denoiser.scheduler.config, **options)
        scheduler.set_timesteps(settings.num_inference_steps)
    return scheduler


def unseen(t: torch.Tensor, x_t: torch.Tensor, prediction: torch.Tensor) -> None:
    """Looks at nothing."""


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    module: nn.Module,
    settings: SamplerSettings,
    seeds: Sequence[int],
    *,
    seen: Seen = unseen,
) -> torch.Tensor:
    """One batch (len(seeds), c, h, w) in [-1, 1]. The noise of an image depends on its seed alone.

    The image of a seed is that of a stock pipeline in float32 with batch 1 and `torch.Generator().manual_seed(seed)`.
    """
    scheduler = make_scheduler(denoiser, settings)
    device = next(module.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(denoiser.sample_shape, generator=generator) for generator in generators]
    x: torch.Tensor = torch.stack(noise).to(device) * scheduler.init_noise_sigma
    accepted = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in (("eta", settings.eta), ("generator", generators)) if key in accepted}
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t)
        prediction = denoiser.predict(module, x_t, t.to(device), {})
        seen(t, x_t, prediction)
        with _refusals(settings):
            x = scheduler.step(prediction, t, x, **options).prev_sample
    return x


@contextmanager
def _refusals(settings: SamplerSettings) -> Iterator[None]:
    """A schedule or prediction type that a sampler of diffusers does not know, in one line."""
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"sampler: {settings.name} does not fit the model: {' '.join(str(error).split())}") from None


def sample_pixels(
    denoiser: Denoiser, module: nn.Module, settings: SamplerSettings, *, seed: int, count: int, batch_size: int
) -> npt.NDArray[np.uint8]:
    """Exactly `count` images (count, h, w, c) in memory: what a search scores, and previews show."""
    sizes = [(first, min(batch_size, count - first)) for first in range(0, count, batch_size)]
    seeds = [image_seeds(seed, first, size) for first, size in sizes]
    return np.concatenate([sample_batch(denoiser, module, settings, batch) for batch in seeds])


def sample_to(
    folder: Path,
    denoiser: Denoiser,
    module: nn.Module,
    settings: SamplerSettings,
    *,
    seed: int,
    count: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Exactly `count` images into `folder/images.npy` (uint8, (count, h, w, c)), going on after the last batch."""
    seeds = image_seeds(seed, 0, count)
    sample_seeds_to(folder, denoiser, module, settings, seeds, batch_size=batch_size, progress=progress)


def sample_seeds_to(
    folder: Path,
    denoiser: Denoiser,
    module: nn.Module,
    settings: SamplerSettings,
    seeds: Sequence[int],
    *,
    batch_size: int,
    cursor_name: str = CURSOR,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """An image for each seed, in their order, into `folder/images.npy`, as `sample_to`."""
    path, cursor, count = folder / IMAGES, folder / cursor_name, len(seeds)
    channels, height, width = denoiser.sample_shape
    shape = (count, height, width, channels)
    done = _resume_at(path, cursor, shape)
    images = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=np.uint8, shape=shape)
    with explained("write", path), path.open("r+b") as file:
        # Writing through a memory map to a full disk kills the process: the blocks are asked for beforehand.
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    for first in range(done, count, batch_size):
        batch = sample_batch(denoiser, module, settings, seeds[first : first + batch_size])
        images[first : first + len(batch)] = batch
        images.flush()
        write_json(cursor, {"done": first + len(batch)})
        progress(first + len(batch))


def sample_batch(
    denoiser: Denoiser,
    module: nn.Module,
    settings: SamplerSettings,
    seeds: Sequence[int],
    *,
    seen: Seen = unseen,
) -> npt.NDArray[np.uint8]:
    """One batch of images (len(seeds), h, w, c). UserError where one is not finite."""
    batch = sample(denoiser, module, settings, seeds, seen=seen)
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
