"""What a dry run says: costs counted as torch counts them, facts against architectures, sums worked by hand."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from deme_diffusion.analysis.similarity import MOST_AT_ONCE
from deme_diffusion.config import FIGURES, UNetSettings
from deme_diffusion.evaluation.extractors.inception_net import FEATURES, InceptionNet
from deme_diffusion.pipeline import needs, space
from deme_diffusion.pipeline.cost_parts import FLOAT
from deme_diffusion.pipeline.estimate import RATES, described, plan, time_said
from deme_diffusion.pipeline.facts import known
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.needs import model_cost
from deme_diffusion.pipeline.run import open_run
from deme_diffusion.pipeline.space import memory
from deme_diffusion.pipeline.unet_cost import unet_cost
from deme_diffusion.recipes import Loaded, load, packaged
from deme_diffusion.recipes.checks import parse

Values = dict[str, Any]
PICO = 10_709
SEARCHED, REPORTED = round(0.15 * 1797), round(0.25 * 1797)
ATTENDING = {
    "sample_size": (16, 8),
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 2,
    "attention_head_dim": None,  # several heads keep more here: on the meta device attention is not fused
}


def from_scratch() -> dict[str, Values]:
    """The architectures that packaged recipes train."""
    recipes = {name: load(name).recipe for name in packaged()}
    unets = {name: r.pretrain.unet.model_dump() for name, r in recipes.items() if r.model.pretrained is None}
    return {name: {**unet, "out_channels": unet["in_channels"]} for name, unet in unets.items()}


ARCHITECTURES: dict[str, Values] = {**known()["unets"], "attending": ATTENDING, **from_scratch()}
ARCHITECTURES["digits"] = {**UNetSettings().model_dump(), "out_channels": 1}


def planned(values: Values, folder: Path, **changes: Any) -> Values:
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values = {**values, section: {**values.get(section, {}), name: value}}
    return plan(open_run(Loaded(parse(values, where="pico"), {}), out=folder / "runs" / "pico", download=False))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


# the count


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_unet_costs_what_torch_counts(name: str) -> None:
    config = ARCHITECTURES[name]
    cost = unet_cost(config)
    assert cost is not None
    with torch.device("meta"):
        unet = UNet2DModel(**config)
        images, t = torch.empty(1, *cost.shape), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(images, t)
    assert cost.parameters == sum(p.numel() for p in unet.parameters())
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert cost.kept == pytest.approx(kept_by_autograd(unet, images, t), rel=0.1)
    assert cost.peak < cost.kept and cost.checkpointed < cost.kept


def kept_by_autograd(unet: torch.nn.Module, images: torch.Tensor, t: torch.Tensor) -> int:
    """Bytes of distinct storages that are saved for the backward pass, parameters left out."""
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(images, t)
    storages = [tensor.untyped_storage() for tensor in saved]
    return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in own}.values())


@pytest.mark.parametrize(
    "change",
    [
        {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D")},
        {"downsample_type": "resnet"},
        {"num_class_embeds": 10},
        {"sample_size": None},
    ],
)
def test_what_cannot_be_counted_is_not_guessed(change: Values) -> None:
    assert unet_cost(ATTENDING) is not None
    assert unet_cost({**ATTENDING, **change}) is None


# the facts


def test_bytes_of_known_models_are_those_of_their_architecture() -> None:
    facts = known()
    for name, fact in facts["models"].items():
        if "unet" not in fact:
            continue  # `test_costs`
        cost = unet_cost(facts["unets"][fact["unet"]])
        assert cost is not None
        assert fact["bytes"] == pytest.approx(FLOAT * cost.parameters, rel=0.01), name


def test_facts_of_inception_are_those_of_the_network() -> None:
    with torch.device("meta"):
        network = InceptionNet().eval()
        images = torch.empty(1, 3, 299, 299)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    facts = known()["inception"]
    assert facts["features"] == FEATURES
    assert facts["flops"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert facts["bytes"] == pytest.approx(FLOAT * sum(p.numel() for p in network.parameters()), rel=0.02)


# the sums, on a pico recipe: 2 experts x 2 steps and a control of 4, batches of 4, validated every second step


def test_flops_are_trainings_validations_searches_and_samples(pico_values: Values, tmp_path: Path) -> None:
    said = planned(pico_values, tmp_path)
    each = said["model"]["forward_flops"]
    forwards = {kind: flops / each for kind, flops in said["flops"].items()}
    experts = 2 * (2 * 4 * 4 + 2 * SEARCHED)  # student 3, teacher 1; one validation, its own range and the rest
    control = 4 * 4 * 4 + 2 * 4 * SEARCHED  # two validations, in quarters
    assert forwards["training"] == experts + control
    assert forwards["search"] == 5 * 16 * 2 + 3 * 2 * SEARCHED  # w = 0, uniform, 2 one-hots, 1 scale; 3 models fitted
    assert forwards["sampling"] == 5 * 16 * (2 + 3)
    assert forwards["measuring"] == 5 * 2 * REPORTED
    assert said["steps"] == 8 and said["model"]["parameters"] == PICO


def test_no_teacher_saves_one_pass_of_four(pico_values: Values, tmp_path: Path) -> None:
    with_it, without = (planned(pico_values, tmp_path, decouple__consistency_weight=w) for w in (1.0, 0.0))
    saved = with_it["flops"]["training"] - without["flops"]["training"]
    assert saved == 8 * 4 * with_it["model"]["forward_flops"]


def test_mixed_precision_quickens_training_only(pico_values: Values, tmp_path: Path) -> None:
    full, half = (planned(pico_values, tmp_path, decouple__mixed_precision=p) for p in ("no", "bf16"))
    saved = full["flops"]["training"] * (1 / RATES["float32"] - 1 / RATES["half precision"]) / 3600
    assert full["gpu_hours"] - half["gpu_hours"] == pytest.approx(saved)
    tf32 = planned(pico_values, tmp_path, decouple__allow_tf32=True)
    assert full["rates"]["training"] == {"precision": "float32", "flops": RATES["float32"]}
    assert tf32["rates"]["training"] == {"precision": "TF32", "flops": RATES["TF32"]}
    sampling = tf32["rates"]["sampling"]  # convolutions in TF32, matrix products in float32: torch's default
    assert sampling["precision"] == "TF32 and float32" and RATES["float32"] < sampling["flops"] < RATES["TF32"]


def test_disk_is_what_stays_and_one_training_on_its_way(pico_values: Values, tmp_path: Path) -> None:
    said = planned(pico_values, tmp_path)
    weights = FLOAT * PICO
    assert said["disk"]["weights"] == (3 * 2 + 2) * weights
    assert said["disk"]["checkpoints"] == 2 * 4 * weights  # raw, averaged, two moments; the last and the new one
    assert said["disk"]["images"] == 5 * 2 * 16 * 8 * 8
    assert said["disk_bytes"] == sum(said["disk"].values())
    twice = planned(pico_values, tmp_path, runtime__jobs=2)["disk"]
    assert twice == {**said["disk"], "checkpoints": 2 * said["disk"]["checkpoints"]}


@pytest.mark.parametrize(
    ("change", "saved"),
    [
        ({"decouple__teacher_dtype": "bfloat16"}, 2),
        ({"decouple__consistency_weight": 0.0}, 4),
        ({"decouple__use_8bit_adam": True}, 6),
        ({"runtime__offload_ema": True}, 4),
        ({"decouple__use_ema": False}, 4),
    ],
)
def test_memory_of_training_counts_each_copy(change: Values, saved: int, pico_values: Values, tmp_path: Path) -> None:
    before, after = (planned(pico_values, tmp_path, **c)["memory_bytes"]["training"] for c in ({}, change))
    assert before - after == saved * PICO


def test_memory_of_nash_holds_a_gradient_for_each_cluster(pico_values: Values, tmp_path: Path) -> None:
    alone = {"decouple__num_ranges": 1, "decouple__multi_task_clusters": 3}
    methods = ("none", "uncertainty", "nash")
    plain, uncertainty, nash = (
        planned(pico_values, tmp_path, **alone, decouple__multi_task=method)["memory_bytes"]["training"]
        for method in methods
    )
    assert uncertainty == plain and nash - plain == 3 * FLOAT * PICO


def test_memory_of_comparing_gradients_is_that_of_a_small_batch(pico_values: Values, tmp_path: Path) -> None:
    recipe = parse({**pico_values, "decouple": {**pico_values["decouple"], "train_batch_size": 512}}, where="test")
    assert space.COMPARED == MOST_AT_ONCE
    graph = Graph(recipe)
    compared, cost = graph.compared(), model_cost(graph)
    assert cost is not None and memory(graph, [compared], cost)["training"] == 16 * PICO + 16 * cost.kept
    lean = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"gradient_checkpointing": True})})
    assert memory(Graph(lean), [compared], cost)["training"] == 16 * PICO + 16 * cost.checkpointed


def test_figures_cost_their_cells_times_their_points(pico_values: Values, tmp_path: Path) -> None:
    """Forward passes: 4 images x 2 draws in each of 2 ranges at 9 and 16 cells; 5 images by 2 steps of 3 models."""
    settings = {"figures": [], "num_images": 4, "draws": 2, "landscape_points": 3, "plane_points": 4}
    compared = {"bins": 12, "num_images": 3}
    values = {**pico_values, "analyze": {**settings, "trajectory_images": 5}, "similarity": compared}
    graph = Graph(parse(values, where="test"))
    cost = model_cost(graph)
    assert cost is not None
    passes = {"landscape": 9 * 16, "plane": 16 * 16, "activations": 3 * 16, "vectors": 0, "trajectory": 3 * 10}
    for name in FIGURES:
        found = [needs.flops(graph, node, cost) / cost.flops for node in graph.figure(name)]
        # Gradients cost three passes; of a range with 10 timesteps there are no more than 10 bins.
        assert found == ([3 * 3 * 12, 3 * 3 * 10, 3 * 3 * 10] if name == "similarity" else [passes[name]])
    alone = Graph(parse({**values, "decouple": {"num_ranges": 1}, "merge": {"method": "none"}}, where="test"))
    passes |= {"landscape": 9 * 8, "plane": 4 * 8, "activations": 2 * 8, "trajectory": 2 * 10}
    for name in FIGURES[1:]:
        assert needs.flops(alone, *alone.figure(name), cost) == passes[name] * cost.flops


def test_figures_have_a_kind_of_their_own(pico_values: Values, tmp_path: Path) -> None:
    plain = planned(pico_values, tmp_path)
    drawn = planned(pico_values, tmp_path, analyze__figures=list(FIGURES))
    assert plain["flops"].pop("figures") == plain["memory_bytes"].pop("figures") == 0
    assert drawn["flops"].pop("figures") > 0 < drawn["memory_bytes"].pop("figures")
    assert drawn["flops"] == plain["flops"]
    stages = {stage["digest"] for stage in drawn["stages"]}
    assert {stage["digest"] for stage in plain["stages"]} < stages
    said = " ".join(described(planned(pico_values, tmp_path, analyze__figures=["plane"])))
    assert "for figures" in said


def test_what_is_to_know_of_a_division_is_told(
    pico_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remark = "division=explicit: of expert 0, the subset is one timestep"
    said = planned(pico_values, tmp_path, decouple__division="explicit", decouple__edges=[1])
    assert remark in described(said)
    values = {**pico_values, "decouple": {**pico_values["decouple"], "division": "explicit", "edges": [1]}}
    monkeypatch.setattr("deme_diffusion.pipeline.run.run_stages", lambda *_, **__: None)
    open_run(Loaded(parse(values, where="pico"), {}), out=tmp_path / "runs" / "pico", download=False).execute()
    assert remark in caplog.messages


def test_memory_grows_with_the_batch_and_less_with_checkpointing(pico_values: Values, tmp_path: Path) -> None:
    cost = unet_cost(UNet2DModel.load_config(Path(pico_values["model"]["pretrained"]) / "unet"))
    assert cost is not None
    changes = [{"decouple__train_batch_size": 4}, {"decouple__train_batch_size": 8}]
    small, large = (planned(pico_values, tmp_path, **c)["memory_bytes"] for c in changes)
    assert small["training"] == 24 * PICO + 4 * cost.kept
    assert large["training"] - small["training"] == 4 * cost.kept
    lean = planned(pico_values, tmp_path, runtime__gradient_checkpointing=True)["memory_bytes"]
    assert small["training"] - lean["training"] == 4 * (cost.kept - cost.checkpointed)
    assert small["sampling"] == 3 * FLOAT * PICO + 256 * cost.peak  # the base, and the ensemble: both experts


def test_a_base_from_scratch_is_estimated_before_it_is_there(pico_values: Values, tmp_path: Path) -> None:
    unet = {"sample_size": 8, "block_out_channels": [4, 8], "norm_num_groups": 2}
    pretrain = {"unet": unet, "total_steps": 10, "scheduler": {"num_train_timesteps": 20, "beta_end": 0.3}}
    said = planned({**pico_values, "model": {}, "pretrain": pretrain}, tmp_path)
    assert said["model"]["parameters"] == PICO and said["steps"] == 18
    more = said["flops"]["training"] - planned(pico_values, tmp_path)["flops"]["training"]
    assert more / said["model"]["forward_flops"] == 3 * 10 * 16 + 4 * SEARCHED  # no teacher; one validation


def test_data_images_are_known_or_not_guessed(pico_values: Values) -> None:
    def images(**data: Any) -> int | None:
        return needs.data_images(parse({**pico_values, "data": data}, where="pico"))

    assert images() == 1797
    assert images(source="hub", path="uoft-cs/cifar10") == 50_000
    assert images(source="hub", path="uoft-cs/cifar10", max_images=100) == 100
    assert images(source="hub", path="uoft-cs/cifar10", split="train+test") == 60_000
    assert images(source="hub", path="uoft-cs/cifar10", split="valid") is None
    assert images(source="hub", path="nobody/nothing") is None
    assert images(source="folder", path="anywhere") is None


# in words


@pytest.mark.usefixtures("empty_cache")
def test_an_unknown_base_is_called_unknown(pico_values: Values, tmp_path: Path) -> None:
    said = planned(pico_values, tmp_path, model__pretrained="nobody/nothing")
    assert said["gpu_hours"] is said["memory_bytes"] is said["disk"] is None
    assert described(said) == [
        "to download: nobody/nothing@main (model, size unknown)",
        "to do: 8 steps; time, memory and disk are unknown before the base is here",
    ]


@pytest.mark.usefixtures("empty_cache")
def test_a_known_base_is_estimated_before_it_is_here() -> None:
    said = plan(open_run(load("cifar10"), download=False))
    downloads = {entry["kind"]: entry["bytes"] for entry in said["downloads"]}
    assert downloads == {"model": 143_000_000, "data": 143_646_105, "extractor": 95_628_359}
    assert said["model"]["parameters"] == 35_746_307 and said["gpu_hours"] > 1
    times = [line for line in described(said) if line.startswith("time:")]
    assert len(times) == 1 and "on one GPU" in times[0] and times[0].endswith("assumed, not measured")


@pytest.mark.usefixtures("empty_cache")
def test_a_pickled_base_is_told_with_its_remedy() -> None:
    lines = described(plan(open_run(load("lsun-church"), download=False)))
    assert lines[0].startswith("to download: google/ddpm-ema-church-256@main (model, 455 MB); its weights are a pickle")
    assert "deme convert FOLDER --out NEW" in lines[0]


def test_what_cores_do_in_minutes_is_said_for_cores(pico_values: Values, tmp_path: Path) -> None:
    times = [line for line in described(planned(pico_values, tmp_path)) if line.startswith("time:")]
    assert times == ["time: about 0 min on this machine's cores (a rough estimate)"]


def test_sizes_of_an_uncountable_architecture_are_rough_but_there(tmp_path: Path, pico_values: Values) -> None:
    plain = pico_values["model"]["pretrained"]
    base = Path(shutil.copytree(plain, tmp_path / "base"))
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "OtherModel"}))
    counted, rough = (planned(pico_values, tmp_path, model__pretrained=str(b)) for b in (plain, base))
    assert rough["model"]["parameters"] == counted["model"]["parameters"]
    assert 0.1 < rough["model"]["forward_flops"] / counted["model"]["forward_flops"] < 10


def test_a_finished_run_needs_nothing(pico_values: Values, tmp_path: Path) -> None:
    run = open_run(Loaded(parse(pico_values, where="pico"), {}), out=tmp_path / "runs" / "pico")
    said = plan(run, set())
    assert all(flops == 0 for flops in said["flops"].values()) and said["disk_bytes"] == said["steps"] == 0
    assert said["stages"] == [] and not any(itertools.chain(said["memory_bytes"].values(), [said["gpu_hours"]]))


def test_times_are_said_in_two_digits() -> None:
    assert [time_said(s) for s in (0, 90, 3600 * 1.96, 3600 * 29_994)] == ["0 min", "2 min", "120 min", "30,000 hours"]
