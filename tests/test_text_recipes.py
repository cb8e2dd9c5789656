"""The text-to-image recipes that ship: what they hold of Table 2, which stages they share, what their dry runs say."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deme_diffusion.artefacts import Store
from deme_diffusion.config import ClipSettings
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline import needs, space
from deme_diffusion.pipeline.estimate import described, plan
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.run import open_run
from deme_diffusion.planner.evidence import what_matters
from deme_diffusion.planner.offline import ablation_of
from deme_diffusion.planner.ranking import Candidate, Choice
from deme_diffusion.recipes import PACKAGED, changed, load
from deme_diffusion.recipes.schema import schema

TABLE_2 = ["sd14-coco30k", "sd14-imagenet1k", "sd14-parti"]
LORA = {"sdxl-lora": 32, "flux-lora": 16}
PAPERS = {"num_ranges": 4, "total_steps": 80_000, "global_prob": 0.3, "consistency_weight": 1.0, "projection": "block"}


@pytest.fixture(autouse=True)
def _nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)


def stages(graph: Graph, *names: str) -> dict[str, str]:
    """Label -> digest, of the stages of these names."""
    return {node.label: node.digest for name in names for node in graph.of_stage(name)}


def test_the_three_of_table_2_train_merge_and_search_once() -> None:
    coco, *others = (Graph(load(name).recipe) for name in TABLE_2)
    shared = ("data", "cache", "decouple", "search", "merge", "similarity", "landscape", "plane", "activations")
    made = stages(coco, *shared)
    assert len(stages(coco, "decouple")) == 5  # four experts, and the control
    for other in others:
        assert stages(other, *shared) == made
        assert not {*stages(other, "sample").values()} & {*stages(coco, "sample").values()}


@pytest.mark.parametrize("name", TABLE_2)
def test_what_the_paper_states_is_set(name: str) -> None:
    recipe = load(name).recipe
    trained = recipe.decouple.model_dump()
    assert {key: trained[key] for key in PAPERS} == PAPERS
    assert recipe.model.pretrained == "CompVis/stable-diffusion-v1-4"
    assert recipe.data.resolution == 512 and "6.5plus" in str(recipe.data.path)
    assert recipe.evaluate.clip_score and recipe.clip.pretrained == "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
    assert "laion2b_s34b_b88k" in (PACKAGED / "sd14-coco30k.yaml").read_text(), "the deviation from BK-SDM is said"
    assert recipe.extractor.kind == "inception"
    assert [s.label for s in recipe.evaluate.samplers] == ["PNDM-25-cfg7.5", "DDIM-25-cfg7.5"]


@pytest.mark.parametrize(
    ("name", "protocol", "images"),
    [(TABLE_2[0], "coco30k", 30_000), (TABLE_2[1], "imagenet1k", 30_000), (TABLE_2[2], "parti", 1_632)],
)
def test_each_of_table_2_asks_by_its_protocol(name: str, protocol: str, images: int) -> None:
    graph = Graph(load(name).recipe)
    assert (graph.recipe.evaluate.prompts.protocol, graph.recipe.evaluate.num_images) == (protocol, images)
    assert graph.asking.measures_fd == (protocol != "parti")
    assert list(graph.of_stage("clip_score"))


@pytest.mark.parametrize("name", [*TABLE_2, *LORA])
def test_no_search_is_judged_by_fd_of_fewer_images_than_features(name: str) -> None:
    recipe = load(name).recipe
    width = space.feature_width(recipe)
    held = needs.split_images(recipe, "search")
    assert held is not None and width == 2048
    enough = min(held, recipe.merge.num_images) > width
    assert recipe.merge.judge == ("fd" if enough else "kid") and enough == (name in TABLE_2)


@pytest.mark.parametrize("name", LORA)
def test_lora_recipes_leave_one_lora(name: str) -> None:
    recipe = load(name).recipe
    assert recipe.decouple.lora_rank == LORA[name] and not recipe.merge.fuse
    assert recipe.model.dtype == recipe.model.encoder_dtype == "bfloat16"
    assert recipe.runtime.gradient_checkpointing


@pytest.mark.parametrize("name", [*TABLE_2, *LORA])
def test_a_dry_run_says_what_a_text_recipe_needs(name: str) -> None:
    said = plan(open_run(load(name), download=False))
    lines = described(said)
    memory = said["memory_bytes"]
    assert min(memory[kind] for kind in ("training", "encoding", "search", "sampling", "figures")) >= 0
    assert 0 < memory["training"] < 80e9 > memory["sampling"] > 0 and 0 < memory["encoding"] < 80e9, "one GPU of 80 GB"
    assert 0 < memory["search"] < 80e9
    assert min(said["disk"][kind] for kind in ("data", "cache", "weights", "checkpoints", "images")) > 0
    assert min(said["flops"][kind] for kind in ("encoding", "training", "search", "sampling", "measuring")) > 0
    rates = said["rates"]
    assert rates["training"]["precision"] == "half precision"
    assert rates["sampling"]["precision"] == ("half precision" if name in LORA else "TF32 and float32")
    (time,) = (line for line in lines if line.startswith("time:"))
    assert f"{rates['training']['flops'] / 1e12:g} TFLOP/s in training (half precision)" in time
    assert any(line.startswith("to do:") and ("by LoRA of" in line) == (name in LORA) for line in lines)
    for kind in ("model", "data", "extractor", "clip"):
        assert any(line.startswith("to download:") and f"({kind}, " in line for line in lines)
    assert said["model"]["parameters"] == {"sdxl-lora": 2_567_463_684, "flux-lora": 11_901_408_320}.get(
        name, 859_520_964
    )


@pytest.mark.parametrize("name", TABLE_2)
def test_missing_files_of_a_protocol_are_told_with_where_to_get_them(name: str) -> None:
    said = " ".join(described(plan(open_run(load(name), download=False))))
    assert "evaluate.prompts.path:" in said and "it comes from http" in said
    assert ("evaluate.prompts.images:" in said) == (name != "sd14-parti")


@pytest.mark.parametrize("name", TABLE_2)
def test_a_protocols_files_are_looked_for_before_anything_is_fetched(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fetched in ("snapshot_download", "hf_hub_download", "HfApi.repo_info"):
        monkeypatch.setattr(f"huggingface_hub.{fetched}", lambda *a, **k: pytest.fail("asked the hub first"))
    with pytest.raises(UserError, match=r"evaluate\.prompts\.path"):
        Graph(load(name).recipe, download=True)


@pytest.mark.parametrize("clip_score", [True, False])
def test_proposed_ablations_ask_for_the_clip_score_where_it_is_measured(clip_score: bool) -> None:
    recipe = load("sdxl-lora", [f"evaluate.clip_score={str(clip_score).lower()}"]).recipe
    change = {"decouple.consistency_weight": 0.0}
    target = frozenset({what_matters(changed(recipe, change))})
    one = Candidate("consistency loss", "REMOVE", None, target, 8000, 0.2, "", False)
    choice = Choice("consistency loss", "REMOVE", (one,), 0.5, 1.0)
    assert ("CLIP score" in ablation_of(choice, recipe).metrics) == clip_score


@pytest.mark.parametrize("name", [*TABLE_2, *LORA])
def test_every_setting_of_the_file_is_one_that_the_schema_knows(name: str) -> None:
    known = schema()
    values = yaml.safe_load((PACKAGED / f"{name}.yaml").read_text())
    text = (PACKAGED / f"{name}.yaml").read_text()
    assert not values.keys() - known["properties"].keys() - {"extends"}
    assert text.startswith("# yaml-language-server: $schema=deme.schema.json\n")
    assert max(map(len, text.splitlines())) <= 120
    assert load(name).recipe.name == name and len(load(name).recipe.description) < 120


def test_all_experts_of_table_2_are_there_once_the_first_has_run(tmp_path: Path) -> None:
    """In one store: of the second recipe only what measures is left to do."""
    store = Store(tmp_path / "runs" / "store")
    coco, parti = (Graph(load(name).recipe, store=store) for name in (TABLE_2[0], TABLE_2[2]))
    there = {node.digest for node in coco.nodes}
    left = {node.stage for node in parti.nodes if node.digest not in there}
    assert left <= {"sample", "clip_score", "evaluate", "trajectory"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["decouple.projection=residual"], "projection=residual.*set decouple.projection=none"),
        (["decouple.init=random"], "init=random.*set decouple.init=pretrained"),
        (["decouple.lora_rank=null", "decouple.lora_targets=[to_q]"], "set decouple.lora_rank"),
    ],
)
def test_a_lora_with_what_it_cannot_have_says_what_to_set(changes: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load("sdxl-lora", changes)


def test_a_clip_of_ones_own_is_trained_where_none_is_named() -> None:
    changes: dict[str, Any] = {"clip": ClipSettings()}
    graph = Graph(load("sdxl-lora").recipe.model_copy(update=changes))
    assert [node.stage for node in graph.of_stage("clip")] == ["clip"]
    assert graph.clip is next(graph.of_stage("clip"))
