"""Pico models, recipes and splits, made in code: every test runs on a CPU, offline, in seconds."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from browser import browser, chromium  # noqa: F401  (fixtures)
from deme_diffusion.config import DataSettings, PretrainSettings, Recipe
from deme_diffusion.data.splits import Split, SplitName, load_splits
from deme_diffusion.evaluation.extractors.classifier import CONFIG, WEIGHTS, SmallClassifier
from deme_diffusion.files import write_json
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.recipes.checks import parse
from deme_diffusion.weights import WEIGHTS_NAME, State, save_state

T = 20


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests compare bits, and share two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pico_pretrain(*, dropout: float = 0.0, prediction_type: str = "epsilon") -> PretrainSettings:
    """Settings of a U-Net of 10,000 parameters on 8x8 images and T = 20."""
    unet = {"sample_size": 8, "block_out_channels": (4, 8), "norm_num_groups": 2, "dropout": dropout}
    scheduler = {"num_train_timesteps": T, "beta_end": 0.3, "prediction_type": prediction_type}
    return PretrainSettings.model_validate({"unet": unet, "scheduler": scheduler})


def make_pico_denoiser(*, seed: int = 0, dropout: float = 0.0, prediction_type: str = "epsilon") -> DDPM:
    """A freshly initialised pico model."""
    return DDPM.from_scratch(pico_pretrain(dropout=dropout, prediction_type=prediction_type), out_seed=seed)


def save_pipeline(denoiser: DDPM, folder: Path) -> Path:
    """The model as a diffusers pipeline folder."""
    from diffusers import DDPMPipeline

    DDPMPipeline(unet=denoiser.module, scheduler=denoiser.scheduler).save_pretrained(folder)
    return folder


def make_pico_values(pipeline: Path | str) -> dict[str, Any]:
    """The plain values of a recipe (for YAML, or `parse`) in which every stage takes a second or less."""
    return {
        "name": "pico",
        "model": {"pretrained": str(pipeline)},
        "decouple": {
            "num_ranges": 2,
            "total_steps": 4,
            "train_batch_size": 4,
            "learning_rate": 1e-3,
            "validation_steps": 2,
        },
        "merge": {"num_images": 16, "scales": [1.0], "sampler": {"num_inference_steps": 2}},
        "evaluate": {
            "samplers": [{"num_inference_steps": 2}, {"name": "DDPMScheduler", "num_inference_steps": 3}],
            "num_images": 16,
            "loss": {"draws": 1},
        },
        "analyze": {"figures": []},
        "runtime": {"device": "cpu", "threads": 1},
    }


def component(folder: Path, state: State, shards: int = 1) -> Path:
    """A component folder; with several shards the tensors are dealt out in turn, and an index says where."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"_class_name": "Toy"}')
    if shards == 1:
        save_file(state, folder / WEIGHTS_NAME)
        return folder
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    owner = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key in state if owner[key] == name}, folder / name)
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owner}))
    return folder


@pytest.fixture
def pico_denoiser() -> DDPM:
    """A fresh pico model for each test."""
    return make_pico_denoiser()


@pytest.fixture(scope="session")
def pico_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_pico_denoiser()` as a diffusers pipeline folder; read only."""
    return save_pipeline(make_pico_denoiser(), tmp_path_factory.mktemp("pico") / "pipeline")


@pytest.fixture
def pico_values(pico_pipeline: Path) -> dict[str, Any]:
    """The pico recipe as plain values, free to be changed."""
    return copy.deepcopy(make_pico_values(pico_pipeline))


@pytest.fixture
def pico_recipe(pico_values: dict[str, Any]) -> Recipe:
    """The pico recipe, checked."""
    return parse(pico_values, where="pico")


def save_classifier(folder: Path, *, channels: int) -> Path:
    """An extractor's folder with an untrained classifier of 8x8 images in it."""
    model = SmallClassifier(channels, 4, 8, 2, size=(8, 8))
    folder.mkdir()
    save_state(folder / WEIGHTS, model.state_dict())
    write_json(folder / CONFIG, {"class": "SmallClassifier", **model.config})
    return folder


@pytest.fixture(scope="session")
def digits() -> dict[SplitName, Split]:
    """The three splits of the digits, unaugmented."""
    return load_splits(DataSettings())
