"""The families on a discrete schedule as tests open them: their tiny pipelines, and the stock ones of diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler

import tiny
from deme_diffusion.models.denoiser import Noised, Prompt
from deme_diffusion.models.families import family
from deme_diffusion.models.latent import LatentDenoiser

T = tiny.T
MADE: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "sd": ("stable_diffusion", tiny.stable_diffusion),
    "sd_v": ("stable_diffusion", lambda folder: tiny.stable_diffusion(folder, prediction_type="v_prediction")),
    "sdxl": ("stable_diffusion_xl", tiny.stable_diffusion_xl),
    "dit": ("dit", tiny.dit),
}
KINDS = {"sd": "StableDiffusionPipeline", "sd_v": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
         "dit": "DiTPipeline"}  # fmt: skip
EXTRA = {"sdxl": {"add_watermarker": False}}
TEXT = ("sd", "sd_v", "sdxl")
LONG = "a dog and a cat and a dog"


@pytest.fixture(scope="session", name="pipelines")
def made_pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each; read only."""
    folder = tmp_path_factory.mktemp("families")
    return {name: make(folder / name) for name, (_, make) in MADE.items()}


def opened(pipelines: dict[str, Path], name: str, dtype: torch.dtype | None = None) -> Any:
    """The model of a folder behind its family's interface."""
    denoiser = family(MADE[name][0]).load(pipelines[name], dtype)
    assert isinstance(denoiser, LatentDenoiser)
    denoiser.module.eval()
    return denoiser


def stock(folder: Path, kind: str, **parts: Any) -> Any:
    """A pipeline as its users load it."""
    pipeline = getattr(diffusers, kind).from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompts(denoiser: Any) -> list[Prompt]:
    """Two."""
    return ["a dog", "2 cats"] if denoiser.takes == "text" else [7, 999]


def batch(denoiser: Any, seed: int = 0) -> dict[str, Any]:
    """A split's batch of 3."""
    images = torch.rand(3, *denoiser.image_shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    said = {"caption": ["a dog", "", "2 cats"]} if denoiser.takes == "text" else {"label": torch.tensor([7, -1, 999])}
    return {"image": images, **said}


def noised(denoiser: Any, t: list[int]) -> Noised:
    """A batch with the noise of a fixed seed."""
    noise = torch.randn(3, *denoiser.sample_shape, generator=torch.Generator().manual_seed(1))
    found: Noised = denoiser.noised(batch(denoiser), torch.tensor(t), noise)
    return found


def copied(pipelines: dict[str, Path], name: str, folder: Path) -> Path:
    """A folder that a test may change."""
    return Path(shutil.copytree(pipelines[name], folder / name))


def rewritten(file: Path, **values: Any) -> None:
    """Values of a JSON file, changed."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def generated(
    denoiser: Any, asked: list[Prompt], seeds: list[int], sampler: Any = DDPMScheduler, **options: Any
) -> Any:
    """Three steps."""
    return denoiser.generate(
        options.pop("module", denoiser.module),
        sampler.from_config(denoiser.scheduler.config),
        asked,
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=3,
        **options,
    )
