"""Every latent family on its tiny pipeline, made once: opened beside images that it takes, and its trainings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import tiny
import tiny_flow
from deme_diffusion.config import DataSettings, DecoupleSettings, ModelSettings, RuntimeSettings
from deme_diffusion.data.sources import Digits, Pixels
from deme_diffusion.data.splits import Split, SplitName, load_splits
from deme_diffusion.decoupling.step import Job
from deme_diffusion.division import Runs
from deme_diffusion.models.denoiser import Noised
from deme_diffusion.models.families import family
from deme_diffusion.weights import WEIGHTS_NAME, State, load_state

MAKERS: dict[str, Callable[[Path], Path]] = {
    "stable_diffusion": tiny.stable_diffusion,
    "stable_diffusion_xl": tiny.stable_diffusion_xl,
    "dit": tiny.dit,
    "stable_diffusion_3": tiny_flow.stable_diffusion_3,
    "flux": tiny_flow.flux,
    "wan": tiny_flow.wan,
}
FAMILIES = tuple(MAKERS)
TRANSFORMERS = ("dit", "stable_diffusion_3", "flux", "wan")
T = tiny.T
SUBSET: Runs = [[5, 12]]
MODEL: dict[str, dict[str, Any]] = {name: {"family": name} for name in FAMILIES}
"""What a recipe says of each model beside its folder."""
for _name in ("stable_diffusion_3", "flux", "wan"):
    MODEL[_name]["max_sequence_length"] = tiny_flow.SEQUENCE
MODEL["wan"]["resolution"] = 16


@cache
def _root() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="deme-families-")


@cache
def pipeline_of(name: str) -> Path:
    """The family's tiny pipeline folder; read only, gone when the tests are over."""
    return MAKERS[name](Path(_root().name) / name)


@cache
def _shared(name: str) -> Any:
    denoiser: Any = family(name).load(pipeline_of(name))
    denoiser.configure(ModelSettings.model_validate(MODEL[name]))
    assert denoiser.pipeline  # loaded once for all tests
    return denoiser


def opened(name: str, dtype: torch.dtype | None = None) -> Any:
    """A denoiser with a module of its own; encoders and tokenizers are shared between tests."""
    denoiser = copy.copy(_shared(name))
    denoiser.module = copy.deepcopy(denoiser.module).eval()
    if dtype is not None:
        denoiser.module = type(denoiser).load(pipeline_of(name), dtype).module.eval()
    return denoiser


class _Coloured(Digits):
    """The digits twice as large and in colour, as the tiny Wan's autoencoder takes images."""

    def pixels(self, index: int) -> Pixels:
        return np.kron(super().pixels(index), np.ones((2, 2, 3), np.uint8))


def split_of(name: str, split: SplitName = "train", count: int = 24) -> Split:
    """Images with captions or labels, as the family takes them."""
    found = load_splits(DataSettings())[split]
    source = _Coloured() if name == "wan" else found.source
    return replace(found, source=source, indices=list(found.indices[:count]), carries=_shared(name).takes)


def noised_of(denoiser: Any, name: str, t: list[int]) -> Noised:
    """Images at these timesteps, with the noise of a fixed seed."""
    noise = torch.randn((len(t), *denoiser.sample_shape), generator=torch.Generator().manual_seed(0))
    found: Noised = denoiser.noised(split_of(name, count=len(t)).view_batch(0), torch.tensor(t), noise)
    return found


def job_of(steps: int = 4, subset: Runs = SUBSET, **options: Any) -> Job:
    """An expert with every technique on, unless options say otherwise."""
    own = {"global_prob": 0.3, "consistency_weight": 1.0, "projection": "residual", "seed": 5, "learning_rate": 1e-2}
    own |= {key: options.pop(key) for key in (*own, "teacher_dtype") if key in options}
    settings = DecoupleSettings(**{"train_batch_size": 2, "proportion_empty_prompts": 0.3, **options})
    return Job("expert 0", settings, subset, steps, **own)


def runtime_of(**options: Any) -> RuntimeSettings:
    """On the CPU, a checkpoint at every second step."""
    return RuntimeSettings(**{"device": "cpu", "checkpointing_steps": 2, **options})


def component_of(name: str, folder: Path) -> State:
    """The weights of a training's kept component."""
    return load_state(folder / _shared(name).component / WEIGHTS_NAME)
