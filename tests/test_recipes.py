"""The recipes that ship: each says offline what it would do, and those of the paper hold its published settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deme_diffusion.config import Recipe
from deme_diffusion.errors import UserError
from deme_diffusion.merging.search import candidates
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.recipes import load, packaged
from test_cli import NO_NETWORK_NO_TORCH, outside

PAPER = ["cifar10", "lsun-church", "lsun-bedroom"]
TEXT = ["sd14-coco30k", "sd14-imagenet1k", "sd14-parti", "sdxl-lora", "flux-lora"]
PUBLISHED = {  # METHOD: the public script's settings
    "learning_rate": 5e-5,
    "lr_scheduler": "constant",
    "adam_beta1": 0.95,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-6,
    "adam_epsilon": 1e-8,
    "train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "mixed_precision": "fp16",
    "max_grad_norm": 1.0,
    "use_ema": True,
    "ema_inv_gamma": 1.0,
    "ema_power": 0.75,
    "ema_max_decay": 0.9999,
    "num_ranges": 4,
    "total_steps": 80_000,
    "global_prob": 0.3,
    "consistency_weight": 1.0,
    "projection": "block",
    "timestep_sampling": "per_batch",
    "antithetic": True,
    "teacher": "frozen",
}
SCRIPTS_WEIGHTS = (0.1, 0.1, 0.2, 0.5)


class Quadratic:
    """The closed form's equations, solved by w = 1."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def normal_equations(self) -> tuple[np.ndarray, np.ndarray]:
        return np.eye(self.experts), np.ones(self.experts)


def weights_to_score(recipe: Recipe) -> list[list[float]]:
    experts = recipe.decouple.num_ranges
    return [c.weights for c in candidates(experts, recipe.merge, lambda: Quadratic(experts))]


@pytest.mark.parametrize("name", packaged())
def test_a_dry_run_needs_no_network_no_torch_and_no_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    work = tmp_path / "work"
    work.mkdir()
    done = outside("run", name, "--dry-run", "--json", script=NO_NETWORK_NO_TORCH, cwd=work)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert not list(work.iterdir())
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["steps"] > 0 and said["gpu_hours"] > 0 and said["seconds"] > 0
    assert said["disk_bytes"] > 0 and min(said["memory_bytes"][kind] for kind in ("training", "sampling")) > 0
    assert all(entry["bytes"] for entry in said["downloads"]), "what a packaged recipe fetches is of known size"
    hub = ["model", "data", "extractor"]
    asking = [*hub, "clip"]
    wanted = {"cifar10-small": ["data"], **dict.fromkeys(PAPER, hub), **dict.fromkeys(TEXT, asking)}
    assert [entry["kind"] for entry in said["downloads"]] == wanted.get(name, [])


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper_train_as_published(name: str) -> None:
    settings = load(name).recipe.decouple.model_dump()
    assert {key: settings[key] for key in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper_measure_as_published(name: str) -> None:
    recipe = load(name).recipe
    assert recipe.extractor.kind == "inception" and recipe.evaluate.num_images == 50_000
    steps = 100 if name == "cifar10" else 50
    assert recipe.evaluate.samplers[0].label == f"DDIM-{steps}" == recipe.merge.sampler.label


@pytest.mark.parametrize("name", ["lsun-church", "lsun-bedroom"])
def test_lsun_images_are_prepared_as_by_the_script(name: str) -> None:
    data = load(name).recipe.data
    prepared = (data.resolution, data.crop, data.interpolation, data.augment.flip)
    assert prepared == (256, "random", "bilinear", 0.0)


def test_the_grid_of_church_holds_the_weights_of_the_script() -> None:
    recipe = load("lsun-church").recipe
    assert list(SCRIPTS_WEIGHTS) in weights_to_score(recipe)
    given = load("lsun-church", ["merge.search=none", f"merge.weights={list(SCRIPTS_WEIGHTS)}"]).recipe
    assert given.merge.weights == SCRIPTS_WEIGHTS


@pytest.mark.parametrize("ranges", [4, 8])
def test_the_budget_of_cifar10_is_the_same_for_any_number_of_experts(ranges: int) -> None:
    recipe = load("cifar10", [f"decouple.num_ranges={ranges}"]).recipe
    graph = Graph(recipe)
    assert [expert.steps for expert in graph.experts[0]] == [80_000 // ranges] * ranges
    control = next(node for node in graph.of_stage("decouple") if node.label == "all-timesteps")
    assert control.steps == 80_000
    assert len(weights_to_score(recipe)) == ranges + 2 + len(recipe.merge.scales)  # none refused, each point once


@pytest.mark.parametrize(
    "off",
    [
        ["global_prob=0", "consistency_weight=0", "projection=none", "num_ranges=1"],
        ["global_prob=0", "consistency_weight=0", "num_ranges=1"],
        ["consistency_weight=0", "projection=none", "num_ranges=8"],
        ["projection=none", "num_ranges=8"],
        ["num_ranges=8"],
    ],
)
def test_every_row_of_table_3_is_an_override_of_cifar10(off: list[str]) -> None:
    graph = Graph(load("cifar10", [f"decouple.{change}" for change in off]).recipe)
    assert sum(expert.steps for expert in graph.experts[0]) == 80_000


def test_a_lora_is_no_run_folder_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UserError, match=r"it is a LoRA"):
        load(str(tmp_path))
