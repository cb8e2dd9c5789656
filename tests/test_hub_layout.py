"""Early hub models (google/ddpm-*) lie in one folder and have old attention names: they load, train and merge alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from deme_diffusion.config import Recipe
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.checkpoints import locate
from deme_diffusion.merging.write import write_into
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.weights import WEIGHTS_NAME, Weights, modern_name

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def modern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with attention, in today's layout."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("modern")
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=20, beta_end=0.3)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flat(modern: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as it would have been uploaded in 2022."""
    folder = tmp_path_factory.mktemp("flat")
    shutil.copy(modern / "model_index.json", folder)
    shutil.copy(modern / "unet" / "config.json", folder)
    scheduler = json.loads((modern / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler_config.json").write_text(json.dumps({**scheduler, "_class_name": "GaussianDDPMScheduler"}))
    save_file({old_name(k): v for k, v in load_file(modern / "unet" / WEIGHTS_NAME).items()}, folder / WEIGHTS_NAME)
    return folder


def old_name(key: str) -> str:
    for new, old in OLD.items():
        for end in ("weight", "bias"):
            key = key.replace(f".{new}.{end}", f".{old}.{end}")
    return key


def test_old_names_are_read_as_from_pretrained_renames_them(modern: Path, flat: Path) -> None:
    with Weights(flat) as old, Weights(modern / "unet") as new:
        assert set(load_file(flat / WEIGHTS_NAME)) != set(new.keys()), "the fixture has old names"
        assert set(old.keys()) == set(new.keys())
        for key in new.keys():  # noqa: SIM118
            assert torch.equal(old.tensor(key), new.tensor(key)), key
    assert modern_name("mid.attentions.0.key.weight") == "mid.attentions.0.to_k.weight"
    assert modern_name("key_embedding.weight") == "key_embedding.weight"


def test_flat_folder_predicts_as_the_modern_one(modern: Path, flat: Path) -> None:
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 17])
    one, other = DDPM.load(modern), DDPM.load(flat)
    with torch.no_grad():
        assert torch.equal(one.predict(one.module, x, t, {}), other.predict(other.module, x, t, {}))
    assert other.num_train_timesteps == 20
    assert torch.equal(one.snr(), other.snr())


def test_recipe_on_a_flat_folder_knows_its_timesteps(flat: Path, pico_recipe: Recipe) -> None:
    model = pico_recipe.model.model_copy(update={"pretrained": str(flat)})
    assert Graph(pico_recipe.model_copy(update={"model": model})).division.num_timesteps == 20


def test_merge_onto_a_flat_base_loads_in_stock_diffusers(modern: Path, flat: Path, tmp_path: Path) -> None:
    with Merger(flat, [modern / "unet"]) as merger:
        write_into(merger, [0.5], locate(flat, what="base"), tmp_path)
    merged = DDPMPipeline.from_pretrained(tmp_path)
    base = UNet2DModel.from_pretrained(modern / "unet").state_dict()
    assert merged.unet.state_dict().keys() == base.keys()
    assert all(torch.allclose(value, base[key]) for key, value in merged.unet.state_dict().items())
    assert merged.scheduler.config.num_train_timesteps == 20
