"""Every row of the parts table, by each action and replacement that it declares, trains, merges and samples."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from deme_diffusion.ablate.declared import declared
from deme_diffusion.ablate.parts import PARTS
from deme_diffusion.ablate.plan import Ablation, Plan
from deme_diffusion.ablate.running import opened_plan
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.recipes import load
from tiny import stable_diffusion

TEXT = ("text dropout", "guidance scale")
"""Parts of models that take text or classes."""


def first_images(graph: Graph, names: Any) -> list[Node]:
    """The images of the model that a recipe is about: what lies before them is all that an arm can change."""
    return [graph.samples[graph.outcome, seed] for seed in graph.recipe.seeds]


@pytest.fixture
def recipe(pico_values: dict[str, Any], tmp_path: Path) -> Path:
    """The pico recipe with a base that has an average beside it, and searches of few trials."""
    base = shutil.copytree(pico_values["model"]["pretrained"], tmp_path / "base")
    shutil.copytree(base / "unet", base / "unet_ema")
    pico_values["model"]["pretrained"] = str(base)
    pico_values["merge"] |= {"search": "none", "num_images": 4, "fisher_samples": 4, "max_evaluations": 16,
                             "gradient_steps": 1, "grid_values": [0.0, 0.5], "finalists": 1}  # fmt: skip
    pico_values["evaluate"]["num_images"] = 4
    pico_values["similarity"] = {"bins": 4}
    (tmp_path / "pico.yaml").write_text(yaml.safe_dump(pico_values))
    return tmp_path / "pico.yaml"


@pytest.fixture
def text_recipe(recipe: Path, tmp_path: Path) -> Path:
    """The same of a tiny text-to-image pipeline."""
    values = yaml.safe_load(recipe.read_text())
    values["model"] = {"family": "stable_diffusion", "pretrained": str(stable_diffusion(tmp_path / "sd"))}
    values["decouple"] |= {"projection": "none", "proportion_empty_prompts": 0.3}
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "text.yaml"


def ablations_of(recipe: Path) -> list[Ablation]:
    return [
        Ablation(f"{part.name} {action}", part.name, action, [json.dumps(dict(change))], change=dict(change))
        for part, action, change in declared(load(str(recipe)).recipe)
    ]


def run_all(ablations: list[Ablation], recipe: Path) -> None:
    experiment = opened_plan(Plan("", ablations), str(recipe), [], out=recipe.parent / "runs" / "pico")
    refused = {t.slug: t.arm.reason for t in experiment.trials if t.arm.status == "not_executable"}
    assert not refused
    experiment.execute()
    assert not {trial.slug: trial.case.error for trial in experiment.ready if trial.case and trial.case.error}
    for case in experiment.cases:
        assert case.steps >= 2
        assert all(experiment.run.store.status(node.key) == "done" for node in case.needed)


@pytest.mark.slow
def test_every_declared_arm_runs(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "measured", first_images)
    ablations = ablations_of(recipe)
    assert {ablation.ablated_part for ablation in ablations} == set(PARTS) - {*TEXT}
    run_all(ablations, recipe)


@pytest.mark.slow
def test_every_declared_arm_of_models_that_take_text_runs(text_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "measured", first_images)
    ablations = [one for one in ablations_of(text_recipe) if one.ablated_part in ("LoRA", *TEXT)]
    assert {ablation.ablated_part for ablation in ablations} == {"LoRA", *TEXT}
    run_all(ablations, text_recipe)
