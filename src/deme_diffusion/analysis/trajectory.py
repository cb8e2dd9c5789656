"""Samples of the same seeds before and after, and one image's way through the steps of a sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from deme_diffusion.analysis.decoding import as_image
from deme_diffusion.analysis.models import Load
from deme_diffusion.config import AnalyzeSettings, SamplerSettings
from deme_diffusion.data.splits import to_pixels
from deme_diffusion.division import Division
from deme_diffusion.evaluation.conditional import unseen
from deme_diffusion.evaluation.sample import Prompts, image_seeds, make_scheduler, of_batch, sample_batch
from deme_diffusion.figure_file import write_figure
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.schedule import FLOW_PREDICTION

Pixels = npt.NDArray[np.uint8]
STEPS = 12
"""Steps of the trajectory that are kept at most, spread evenly."""
SIDE = 128
"""Pixels along the longer side of an image that are kept at most; larger ones are reduced by a whole factor."""


def write_trajectory(
    path: Path,
    denoiser: Denoiser,
    models: Mapping[str, Load],
    division: Division,
    sampler: SamplerSettings,
    settings: AnalyzeSettings,
    *,
    names: Sequence[str],
    batch_size: int,
    prompts: Prompts = None,
) -> dict[str, Any]:
    """Sample every model at the same seeds, those of `evaluation.sample`, and prompts; follow the first image.

    Arrays: `grid_<model>` (n, h, w, c) uint8; `x_t_<model>` and `x_0_<model>` (s, h, w, c), what the model gets at step
    s and the clean image that it then predicts; `timesteps` (s,), `steps` (s,) counted from 0, `experts` (s,), the
    one that serves the timestep. Returns: plain numbers.
    """
    num_steps = len(make_scheduler(denoiser, sampler).timesteps)
    chosen = chosen_steps(num_steps)
    seeds = image_seeds(settings.seed, 0, settings.trajectory_images)
    arrays, timesteps = _sampled_by_all(denoiser, models, sampler, seeds, prompts, batch_size, chosen)
    serving = division.route[denoiser.index_of_step(timesteps).cpu().numpy()]
    grids = {name: arrays[f"grid_{name}"] for name in models}
    before = next(iter(grids.values()))
    size, changed = before.shape[1:3], {name: _difference(before, grid) for name, grid in grids.items()}
    factor = reduction(size)
    drawn = {"models": list(models), "names": list(names), "size": list(size), "reduced_by": factor, "changed": changed}
    steps = {"num_timesteps": division.num_timesteps, "num_steps": num_steps}
    meta = {**drawn, **steps, "sampler": sampler.label, "seed": settings.seed}
    meta |= {} if prompts is None else {"prompts": list(prompts)}
    write_figure(
        path,
        "trajectory",
        meta,
        **{name: reduced(array, factor) for name, array in arrays.items()},
        timesteps=timesteps.double().cpu().numpy(),
        steps=np.array(chosen),
        experts=serving,
    )
    return {"images": len(seeds), "steps": num_steps, "shown": len(chosen), "changed": changed}


def chosen_steps(count: int, most: int = STEPS) -> list[int]:
    """Which of `count` steps are shown: all, or `most` spread evenly, the first and the last among them."""
    return [int(step) for step in np.linspace(0, count - 1, min(count, most)).round()]


def predicted_clean(denoiser: Denoiser, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_0 by the prediction at t: from x_t = sqrt(a) x_0 + sqrt(1 - a) eps, v = sqrt(a) eps - sqrt(1 - a) x_0.

    a is the cumulated alpha of the schedule; at a fraction of a timestep sigma = sqrt((1 - a) / a) is interpolated.
    Of flow matching, where sigma = t / T: from x_t = (1 - sigma) x_0 + sigma eps, v = eps - x_0.
    """
    if denoiser.prediction_type == "sample":
        return prediction
    if denoiser.prediction_type == FLOW_PREDICTION:
        return torch.sub(x_t, prediction * (float(t) / denoiser.num_train_timesteps))
    alphas = denoiser.scheduler.alphas_cumprod.double().cpu().numpy()
    with np.errstate(divide="ignore"):  # a schedule may end without signal
        sigmas = np.sqrt((1 - alphas) / alphas)
    sigma = float(np.interp(float(t), np.arange(len(sigmas)), sigmas))
    signal, noise = 1 / (1 + sigma**2) ** 0.5, (1.0 if np.isinf(sigma) else sigma / (1 + sigma**2) ** 0.5)
    if denoiser.prediction_type == "v_prediction":
        return torch.sub(x_t * signal, prediction * noise)
    return torch.sub(x_t, prediction * noise) / signal if signal else torch.zeros_like(x_t)


def reduction(size: Sequence[int], side: int = SIDE) -> int:
    """The whole factor by which images of this size (h, w) are reduced, so that no side is longer than `side`."""
    return -(-max(size) // side)


def reduced(images: Pixels, factor: int) -> Pixels:
    """(n, h, w, c) with factor x factor pixels averaged to one."""
    if factor == 1:
        return images
    return np.stack([_reduced(image, factor) for image in images])


def _reduced(pixels: Pixels, factor: int) -> Pixels:
    made = np.asarray(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).reduce(factor))
    return made.reshape(*made.shape[:2], pixels.shape[-1])


class _Followed:
    """The first image of the first batch at some steps: what the model gets, and the clean image that it predicts."""

    def __init__(self, denoiser: Denoiser, chosen: set[int]) -> None:
        self.denoiser, self.chosen, self.step = denoiser, chosen, 0
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.timesteps: list[torch.Tensor] = []

    def __call__(self, t: torch.Tensor, x_t: torch.Tensor, prediction: torch.Tensor) -> None:
        if self.step in self.chosen:
            clean = predicted_clean(self.denoiser, x_t[:1], prediction[:1], t)
            self.kept.append((x_t[:1].clone(), clean))
            self.timesteps.append(t.cpu())
        self.step += 1

    def pixels(self, which: int) -> Pixels:
        """(s, h, w, c): x_t (0) or x_0 (1)."""
        return to_pixels(torch.cat([as_image(self.denoiser, pair[which]) for pair in self.kept]))


def _sampled_by_all(
    denoiser: Denoiser,
    models: Mapping[str, Load],
    sampler: SamplerSettings,
    seeds: Sequence[int],
    prompts: Prompts,
    batch_size: int,
    chosen: Sequence[int],
) -> tuple[dict[str, Pixels], torch.Tensor]:
    """Grids and ways of all models, loaded one after another; and the timesteps that were chosen."""
    arrays = dict[str, Pixels]()
    with tqdm(total=len(models) * len(seeds), unit="image", desc="samples", disable=None) as progress:
        for name, load in models.items():
            followed = _Followed(denoiser, set(chosen))
            arrays[f"grid_{name}"] = _sampled(denoiser, load(), sampler, seeds, prompts, batch_size, followed, progress)
            arrays |= {f"x_t_{name}": followed.pixels(0), f"x_0_{name}": followed.pixels(1)}
    return arrays, torch.stack(followed.timesteps)


def _sampled(
    denoiser: Denoiser,
    module: nn.Module,
    sampler: SamplerSettings,
    seeds: Sequence[int],
    prompts: Prompts,
    batch_size: int,
    followed: _Followed,
    progress: Any,
) -> Pixels:
    """(n, h, w, c), batch by batch as `evaluation.sample.sample_pixels`, the first image followed."""
    batches = []
    for first in range(0, len(seeds), batch_size):
        part = seeds[first : first + batch_size]
        seen = unseen if first else followed
        asked = of_batch(prompts, first, len(part))
        batches.append(sample_batch(denoiser, module, sampler, part, prompts=asked, seen=seen))
        progress.update(len(part))
    return np.concatenate(batches)


def _difference(before: Pixels, after: Pixels) -> float:
    """The mean absolute difference of pixels, of 255."""
    return float(np.abs(before.astype(np.int16) - after.astype(np.int16)).mean())
