"""Digests cover what shapes a result and nothing else; a run leaves its evidence, and running it again does nothing."""

import copy
import csv
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from conftest import make_pico_values
from deme_diffusion.artefacts import Store
from deme_diffusion.clean_up import clean, referenced
from deme_diffusion.config import LossSettings
from deme_diffusion.data.splits import Split, SplitName
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.extractors import load_extractor
from deme_diffusion.evaluation.features import features_of, real_pixels
from deme_diffusion.evaluation.scores import score_images
from deme_diffusion.models import projection
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.pipeline import stages as stages_module
from deme_diffusion.pipeline import table
from deme_diffusion.pipeline.estimate import plan
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.recipes import Loaded, load
from deme_diffusion.recipes.checks import parse
from deme_diffusion.report.tables import check_protocols, read_table
from deme_diffusion.weights import WEIGHTS_NAME, State, load_state, save_state, state_digest

Values = dict[str, Any]
MODELS = ["base", "all-timesteps", "ensemble", "merged-uniform", "merged"]


def changed(values: Values, changes: Values) -> Values:
    """A copy with some dotted keys set."""
    result = copy.deepcopy(values)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        section = result
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    return result


def graph_of(values: Values, **changes: Any) -> Graph:
    return Graph(parse(changed(values, {k.replace("__", "."): v for k, v in changes.items()}), where="test"))


def digests(graph: Graph, stage: str | None = None) -> set[tuple[str, str]]:
    return {(node.stage, node.digest) for node in graph.nodes if stage in (None, node.stage)}


def opened(values: Values, folder: Path) -> Run:
    return open_run(Loaded(parse(values, where="test"), {}), out=folder, command="deme run pico")


def executed(values: Values, folder: Path) -> Run:
    run = opened(values, folder)
    run.execute()
    run.report()
    return run


# digests


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("jobs", 2),
        ("dataloader_num_workers", 1),
        ("checkpointing_steps", 1),
        ("checkpoints_total_limit", 3),
        ("logging_steps", 1),
        ("preview_steps", 1),
        ("sample_batch_size", 30),  # below 16 serving is measured in smaller batches
    ],
)
def test_runtime_settings_change_no_digest(pico_values: Values, key: str, value: Any) -> None:
    assert digests(graph_of(pico_values, **{f"runtime__{key}": value})) == digests(graph_of(pico_values))


@pytest.mark.parametrize(
    ("key", "value"),
    [("threads", 2), ("resident_experts", 1), ("device", "cuda"), ("compile", True), ("channels_last", True)],
)
def test_runtime_settings_that_serving_costs_depend_on_change_that_digest_alone(
    pico_values: Values, key: str, value: Any
) -> None:
    there, here = graph_of(pico_values, **{f"runtime__{key}": value}), graph_of(pico_values)
    assert there.cost.digest != here.cost.digest
    assert [n.digest for n in there.nodes if n.stage != "cost"] == [n.digest for n in here.nodes if n.stage != "cost"]


def test_description_and_name_change_no_digest(pico_values: Values) -> None:
    renamed = graph_of(pico_values, name="other", description="words", demonstration=True)
    assert digests(renamed) == digests(graph_of(pico_values))


def test_place_of_the_base_changes_no_digest_and_its_content_does(pico_values: Values, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(pico_values["model"]["pretrained"], moved)
    values = changed(pico_values, {"model.pretrained": str(moved)})
    assert digests(graph_of(values)) == digests(graph_of(pico_values))
    state = load_state(moved / "unet" / WEIGHTS_NAME)
    save_state(moved / "unet" / WEIGHTS_NAME, {**state, "conv_in.bias": state["conv_in.bias"] + 1e-7})
    assert not digests(graph_of(values), "decouple") & digests(graph_of(pico_values), "decouple")


@pytest.mark.parametrize(
    "changes",
    [
        {"merge__search": "none"},
        {"merge__search": "grid"},
        {"merge__method": "none"},
        {"merge__num_images": 8},
        {"merge__ridge": 0.5},
        {"merge__search": "none", "merge__weights": [0.1, 0.9]},
        {"evaluate__num_images": 8},
        {"evaluate__neighbours": 2},
    ],
)
def test_changes_of_merge_and_evaluation_share_the_experts(pico_values: Values, changes: Values) -> None:
    before, after = graph_of(pico_values), graph_of(pico_values, **changes)
    assert digests(after, "decouple") == digests(before, "decouple")
    assert digests(after) != digests(before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 2e-3),
        ("global_prob", 0.0),
        ("consistency_weight", 0.5),
        ("projection", "none"),
        ("train_batch_size", 8),
        ("use_ema", False),
        ("total_steps", 6),
        ("keep", "best"),
    ],
)
def test_training_settings_change_every_training_and_its_heirs_but_not_the_base(
    pico_values: Values, key: str, value: Any
) -> None:
    before, after = (graph_of({**pico_values, "model": {}}, **changes) for changes in ({}, {f"decouple__{key}": value}))
    assert digests(before, "pretrain") == digests(after, "pretrain") != set()
    for stage in ("decouple", "search", "merge"):
        assert not digests(before, stage) & digests(after, stage)


def test_data_settings_change_every_training(pico_values: Values) -> None:
    before, after = graph_of(pico_values), graph_of(pico_values, data__augment={"shift": 1.0})
    assert not digests(before, "decouple") & digests(after, "decouple")


def test_expert_is_known_by_its_subset_steps_and_rate_however_they_are_written(pico_values: Values) -> None:
    even = graph_of(pico_values)
    spelled = graph_of(
        pico_values,
        decouple__total_steps=1000,
        decouple__range_steps=[2, 2],
        decouple__range_learning_rates=[1e-3, 1e-3],
        decouple__learning_rate=7.0,
    )
    assert [e.digest for e in spelled.experts[0]] == [e.digest for e in even.experts[0]]
    elsewhere = even._decouple("another name", [[10, 20]], 2, 1e-3, 0)
    assert elsewhere is even.experts[0][1]
    uneven = graph_of(pico_values, decouple__range_steps=[2, 3])
    assert uneven.experts[0][0].digest == even.experts[0][0].digest
    assert uneven.experts[0][1].digest != even.experts[0][1].digest


def test_control_of_an_equal_budget_does_not_depend_on_the_division(pico_values: Values) -> None:
    two, four = (graph_of(pico_values, decouple__num_ranges=n) for n in (2, 4))
    controls = [next(s for s in graph.served[0] if s.name == "all-timesteps").parts[0] for graph in (two, four)]
    assert controls[0].digest == controls[1].digest


def test_experts_of_a_finer_division_are_others(pico_values: Values) -> None:
    two, four = graph_of(pico_values), graph_of(pico_values, decouple__num_ranges=4, decouple__total_steps=8)
    assert len(four.experts[0]) == 4
    assert not {e.digest for e in two.experts[0]} & {e.digest for e in four.experts[0]}


def test_settings_spelled_out_at_their_defaults_change_no_digest(pico_values: Values) -> None:
    defaults = {"global_prob": 0.3, "consistency_weight": 1.0, "adam_beta1": 0.95, "lr_scheduler": "constant",
                "projection": "residual", "division": "uniform", "keep": "last"}  # fmt: skip
    spelled = graph_of(
        pico_values, **{f"decouple__{k}": v for k, v in defaults.items()}, merge__ridge=1e-3, data__views=1
    )
    assert digests(spelled) == digests(graph_of(pico_values))


def test_seeds_have_experts_of_their_own_and_one_base(pico_values: Values) -> None:
    graph = graph_of({**pico_values, "model": {}, "seeds": [3, 4]})
    assert len(digests(graph, "pretrain")) == 1
    assert not {e.digest for e in graph.experts[3]} & {e.digest for e in graph.experts[4]}
    assert all(node.parents["base"] is graph.base for node in graph.of_stage("decouple"))
    single = graph_of({**pico_values, "model": {}, "seeds": [3]})
    assert digests(single, "decouple") < digests(graph, "decouple")


def test_one_range_is_the_training_on_all_timesteps(pico_values: Values) -> None:
    graph = graph_of(pico_values, decouple__num_ranges=1)
    assert len(digests(graph, "decouple")) == 1
    assert next(graph.of_stage("decouple")).steps == 4
    assert [served.name for served in graph.served[0]] == MODELS


def test_control_on_all_timesteps_has_the_whole_budget(pico_values: Values) -> None:
    graph = graph_of(pico_values, decouple__range_steps=[5, 7])
    control = next(s for s in graph.served[0] if s.name == "all-timesteps").parts[0]
    assert isinstance(control, Node)
    assert control.steps == 12
    assert control.arguments["subset"] == [[0, 20]]


def test_controls_appear_when_asked_for(pico_values: Values) -> None:
    asked = graph_of(pico_values, evaluate__controls=["all-timesteps", "soup", "all-timesteps-searched"])
    names = ["base", "all-timesteps", "all-timesteps-searched", "soup", "ensemble", "merged-uniform", "merged"]
    assert [served.name for served in asked.served[0]] == names
    assert {name for name, _, _ in asked.evaluations} == {*names, "training images"}
    copies = [node for node in asked.of_stage("decouple") if "soup" in node.label]
    assert [(c.steps, c.arguments["subset"]) for c in copies] == [(2, [[0, 20]])] * 2
    assert copies[0].digest != copies[1].digest
    assert len(digests(asked, "search")) == 3
    assert [s.name for s in graph_of(pico_values, evaluate__controls=[]).served[0]] == [
        name for name in MODELS if name != "all-timesteps"
    ]


def test_given_weights_need_no_search(pico_values: Values) -> None:
    graph = graph_of(pico_values, merge__search="none", merge__weights=[0.1, 0.9])
    assert not digests(graph, "search")
    assert graph.merged[0].key.settings["weights"] == [0.1, 0.9]


def test_without_a_method_only_the_ensemble_is_served(pico_values: Values) -> None:
    graph = graph_of(pico_values, merge__method="none")
    assert [served.name for served in graph.served[0]] == ["base", "all-timesteps", "ensemble"]
    assert not digests(graph, "merge")


def test_parents_come_before_their_children(pico_values: Values) -> None:
    graph = graph_of({**pico_values, "model": {}, "extractor": {"pretrained": None}, "seeds": [0, 1]})
    seen: set[str] = set()
    for node in graph.nodes:
        assert {p.digest for p in node.parents.values() if isinstance(p, Node)} <= seen
        seen.add(node.digest)


def test_needed_stages_of_an_expert_are_itself_and_the_base(pico_values: Values) -> None:
    graph = graph_of({**pico_values, "model": {}})
    assert [n.stage for n in graph.needed([graph.experts[0][1]])] == ["pretrain", "decouple"]


def test_more_ranges_than_timesteps_are_a_user_error(pico_values: Values) -> None:
    with pytest.raises(UserError, match="21 ranges do not fit into 20 timesteps"):
        graph_of(pico_values, decouple__num_ranges=21, decouple__total_steps=100)


# the dry run


def test_plan_counts_the_steps_that_are_left(pico_values: Values, tmp_path: Path) -> None:
    run = opened(pico_values, tmp_path / "runs" / "pico")
    planned = plan(run)
    assert (planned["recipe"], planned["steps"], planned["download"]) == ("pico", 8, None)
    assert {stage["status"] for stage in planned["stages"]} == {"missing"}
    assert planned["seconds"] >= 0
    assert planned["disk_bytes"] > 5 * 2 * 10_709  # experts and control, averaged and raw, and two merged models
    assert not (tmp_path / "runs").exists()
    run.execute(run.graph.experts[0][:1])
    after = plan(opened(pico_values, tmp_path / "runs" / "pico"))
    assert after["steps"] == 6
    assert [s["label"] for s in after["stages"] if s["status"] == "done"] == ["expert 0 [0,10)"]
    assert after["disk_bytes"] < planned["disk_bytes"]


def test_plan_of_some_stages_speaks_of_these(pico_values: Values, tmp_path: Path) -> None:
    run = opened(pico_values, tmp_path / "runs" / "pico")
    planned = plan(run, {run.graph.experts[0][1].digest})
    assert [stage["label"] for stage in planned["stages"]] == ["expert 1 [10,20)"]


# a whole run


@pytest.fixture(scope="module")
def values(pico_pipeline: Path) -> Values:
    return make_pico_values(pico_pipeline)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, values: Values) -> Run:
    """The pico recipe, run once; read only."""
    return executed(values, tmp_path_factory.mktemp("whole") / "runs" / "pico")


@pytest.fixture
def again(finished: Run, tmp_path: Path) -> Iterator[Run]:
    """A copy of the finished run, opened anew, free to be spoiled."""
    shutil.copytree(finished.folder.parent, tmp_path / "runs", symlinks=True)
    yield opened(finished.recipe.model_dump(mode="json"), tmp_path / "runs" / "pico")


def manifests(store: Store) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in store.root.glob("*/*/manifest.json")}


def test_run_folder_holds_recipe_table_page_and_links(finished: Run) -> None:
    folder = finished.folder
    assert load(str(folder)).recipe == finished.recipe
    page = (folder / "report.html").read_text()
    assert "merged-uniform" in page and "<html" in page
    stages = json.loads((folder / "run.json").read_text())["stages"]
    assert {s["digest"] for s in stages} == {n.digest for n in finished.graph.nodes}
    assert all("seconds" in stage for stage in stages)
    assert (folder / "base").resolve() == Path(finished.recipe.model.pretrained or "").resolve()
    assert sorted(path.name for path in (folder / "experts").iterdir()) == ["0", "1"]
    for i, expert in enumerate(finished.graph.experts[0]):
        assert (folder / "experts" / str(i)).resolve() == finished.store.folder(expert.key).resolve()
    assert (folder / "merged" / "unet" / WEIGHTS_NAME).is_file()
    assert not (folder / "base").readlink().is_absolute()


def test_table_has_a_row_a_model_and_the_training_images(finished: Run) -> None:
    rows = read_table(finished.folder / "table.json")
    assert [row["model"] for row in rows] == [*MODELS, "training images"]
    scores = ("FD(digits-cnn)", "KID(digits-cnn)", "IS(digits-cnn)", "precision", "recall", "density", "coverage")
    columns = {f"{score} {sampler}" for score in scores for sampler in ("DDIM-2", "DDPM-3")}
    columns |= {"loss", "loss [0,10)", "loss [10,20)", "parameters", "latency (ms)", "load time (ms)"}
    columns |= {"peak memory (MB)", "disk (MB)"}
    for row in rows[:-1]:
        assert set(row["metrics"]) == columns, row["model"]
    assert set(rows[-1]["metrics"]) == {name for name in columns if "DDIM" in name or "DDPM" in name}


def test_too_few_training_images_have_no_score_and_the_table_stands(pico_values: Values) -> None:
    graph = graph_of(pico_values)
    samples = [f"{sampler.label}/0" for sampler in graph.recipe.evaluate.samplers]
    scores = {"FD": 1.0, "KID": 0.1, "precision": 0.5, "recall": 0.5}
    full, few = scores | {"n": graph.recipe.evaluate.num_images}, scores | {"n": 3}
    measured = {"reference_images": 9, "manifold_images": 9, "preprocessing": "none"}
    base = table._image_scores(graph, {0: {**measured, "images": dict.fromkeys(samples, full)}}, "cnn")
    real = table._image_scores(graph, {0: {**measured, "images": {"real": few}}}, "cnn")
    check_protocols([{"model": "base", "metrics": base}, {"model": "training images", "metrics": real}])
    assert all(figure["mean"] is None and "3 images" in figure["reason"] for figure in real.values())
    assert all(figure["mean"] is not None for figure in base.values())


def test_every_figure_carries_mean_spread_n_seeds_and_protocol(finished: Run) -> None:
    for row in read_table(finished.folder / "table.json"):
        for name, figure in row["metrics"].items():
            assert set(figure) >= {"mean", "spread", "n", "seeds", "protocol"}, name
            assert isinstance(figure["mean"], float | int)
            assert figure["seeds"] == [0]
            assert figure["n"] >= 1
            if "FD" in name:
                asked = {"sampler": "DDIMScheduler" if "DDIM" in name else "DDPMScheduler", "n": 16, "split": "report"}
                assert asked.items() <= figure["protocol"].items()
                assert {"extractor", "preprocessing", "steps", "seeds", "reference"} <= set(figure["protocol"])


def test_csv_and_markdown_tell_the_same_as_the_json(finished: Run) -> None:
    rows = read_table(finished.folder / "table.json")
    with (finished.folder / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    told = {(line["model"], line["metric"]): float(line["mean"]) for line in lines}
    assert told == {(row["model"], name): figure["mean"] for row in rows for name, figure in row["metrics"].items()}
    markdown = (finished.folder / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in markdown[2:8]] == [*MODELS, "training images"]


def test_ensemble_costs_what_its_experts_do_and_merged_what_the_base_does(finished: Run) -> None:
    cost = {
        row["model"]: {name: row["metrics"][name]["mean"] for name in ("parameters", "peak memory (MB)", "disk (MB)")}
        for row in read_table(finished.folder / "table.json")[:-1]
    }
    base, merged, ensemble = cost["base"], cost["merged"], cost["ensemble"]
    assert base["parameters"] == merged["parameters"] == 10_709
    assert ensemble["parameters"] == 2 * 10_709
    assert merged["peak memory (MB)"] == base["peak memory (MB)"]
    assert ensemble["peak memory (MB)"] > base["peak memory (MB)"]
    assert ensemble["disk (MB)"] > 2 * base["disk (MB)"]
    assert merged["disk (MB)"] == pytest.approx(base["disk (MB)"], rel=0.02)


def eq8_with_projections(run: Run, weights: list[float]) -> State:
    """K' = (I + sum_i w_i D_i) (K + sum_i w_i tau_i), in float64, from the files of base and experts."""
    base = load_state(run.folder / "base" / "unet" / WEIGHTS_NAME)
    folders = [run.folder / "experts" / str(i) / "unet" for i in range(2)]
    experts, matrices = [load_state(f / WEIGHTS_NAME) for f in folders], [projection.load(f) for f in folders]
    merged = {
        k: v.double() + sum(w * (e[k].double() - v.double()) for w, e in zip(weights, experts, strict=True))
        for k, v in base.items()
    }
    assert len(matrices[0]) > 3
    for place in matrices[0]:
        d = sum(w * m[place].double() for w, m in zip(weights, matrices, strict=True))
        assert isinstance(d, torch.Tensor)
        p = torch.eye(len(d), dtype=torch.float64) + d
        merged[f"{place}.weight"] = torch.einsum("oc,c...->o...", p, merged[f"{place}.weight"])
        merged[f"{place}.bias"] = p @ merged[f"{place}.bias"]
    return merged


def test_merged_models_are_eq_8_of_the_experts_files(finished: Run) -> None:
    found = json.loads((finished.store.folder(finished.graph.searches[0].key) / "search.json").read_text())
    uniform = next(s for s in finished.graph.served[0] if s.name == "merged-uniform").parts[0]
    assert isinstance(uniform, Node)
    for folder, weights in (
        (finished.folder / "merged", found["weights"]),
        (finished.store.folder(uniform.key), [0.5, 0.5]),
    ):
        merged, expected = load_state(folder / "unet" / WEIGHTS_NAME), eq8_with_projections(finished, weights)
        assert merged.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(merged[key].double(), tensor, rtol=0, atol=1e-6)
        with safe_open(folder / "unet" / WEIGHTS_NAME, framework="pt") as file:
            recipe = json.loads(file.metadata()["deme_merge"])
        assert recipe["weights"] == weights
        assert recipe["experts"] == [expert.digest for expert in finished.graph.experts[0]]
    base = load_state(finished.folder / "base" / "unet" / WEIGHTS_NAME)
    assert state_digest(load_state(finished.store.folder(uniform.key) / "unet" / WEIGHTS_NAME)) != state_digest(base)


def test_searched_model_is_the_best_of_the_trials(finished: Run) -> None:
    found = json.loads((finished.store.folder(finished.graph.searches[0].key) / "search.json").read_text())
    assert found["value"] == min(trial["value"] for trial in found["trials"])
    assert {"w = 0", "uniform", "one-hot 0", "one-hot 1"} <= {trial["source"] for trial in found["trials"]}


def test_reference_of_every_score_is_the_report_split(finished: Run, digits: dict[SplitName, Split]) -> None:
    extractor = load_extractor(finished.graph.extractor.folder)  # type: ignore[union-attr]
    features = {name: features_of(real_pixels(digits[name]), extractor) for name in ("train", "report")}
    node = finished.graph.samples[("base", 0)]
    images = np.load(finished.store.folder(node.key) / "images.npy")
    rows = {row["model"]: row["metrics"] for row in read_table(finished.folder / "table.json")}
    for name, own in (("training images", features["train"][:16]), ("base", features_of(images, extractor))):
        manifold = features["report"][: len(digits["report"])]
        expected = score_images(features["report"], own, neighbours=3, manifold=manifold)
        found = rows[name]
        assert found["FD(digits-cnn) DDIM-2"]["mean"] == pytest.approx(expected["FD"], rel=1e-6)
        assert found["recall DDIM-2"]["mean"] == expected["recall"]
        assert found["FD(digits-cnn) DDIM-2"]["n"] == 16


def test_losses_of_the_table_are_taken_on_the_report_split(finished: Run, digits: dict[SplitName, Split]) -> None:
    denoiser = DDPM.load(finished.folder / "base")
    noise = FixedNoise(denoiser, digits["report"], [[[0, 10]], [[10, 20]]], LossSettings(draws=1))
    expected = noise.losses(denoiser.module.eval())
    base = read_table(finished.folder / "table.json")[0]["metrics"]
    found = [base[name]["mean"] for name in ("loss [0,10)", "loss [10,20)", "loss")]
    assert found == pytest.approx([*expected, sum(expected) / 2], rel=1e-6)


def test_merging_by_zero_scores_exactly_as_the_base_on_the_same_seeds(again: Run, values: Values) -> None:
    given = {"merge.search": "none", "merge.weights": [0.0, 0.0]}
    run = executed(changed(values, given), again.folder.parent / "zero")
    rows = {row["model"]: row["metrics"] for row in read_table(run.folder / "table.json")}
    for name, figure in rows["base"].items():
        if not name.endswith(("(ms)", "(MB)")):
            assert rows["merged"][name]["mean"] == figure["mean"], name
    assert rows["merged-uniform"]["loss"]["mean"] != rows["base"]["loss"]["mean"]


# running again


def test_running_again_recomputes_nothing(again: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a stage was made again")

    monkeypatch.setattr(stages_module.Stages, "make", never)
    before, table = manifests(again.store), (again.folder / "table.json").read_bytes()
    assert len(before) == len(again.graph.nodes)
    started = time.perf_counter()
    again.execute()
    again.report()
    assert time.perf_counter() - started < 5
    assert manifests(again.store) == before
    assert (again.folder / "table.json").read_bytes() == table
    assert all(stage["reused"] for stage in json.loads((again.folder / "run.json").read_text())["stages"])


def test_truncated_artefact_is_noticed_logged_and_made_again(again: Run, caplog: pytest.LogCaptureFixture) -> None:
    path = again.folder / "merged" / "unet" / WEIGHTS_NAME
    whole, before = path.read_bytes(), manifests(again.store)
    path.write_bytes(whole[:-100])
    with caplog.at_level(logging.WARNING, logger="deme_diffusion"):
        again.execute()
    merge = again.graph.merged[0]
    said = [record.getMessage() for record in caplog.records if "made again" in record.getMessage()]
    assert len(said) == 1
    assert f"merge {merge.digest}: unet/{WEIGHTS_NAME} has" in said[0]
    assert path.read_bytes() == whole
    after = manifests(again.store)
    assert {digest for digest in before if after[digest] != before[digest]} == {merge.digest}


def test_failure_in_one_stage_keeps_those_before_and_the_next_run_goes_on(
    finished: Run, values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(values, tmp_path / "runs" / "pico")
    with monkeypatch.context() as patched:
        patched.setattr(stages_module, "write_into", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.execute([run.graph.merged[0]])
    done = {n.digest for n in run.graph.nodes if run.store.status(n.key) == "done"}
    assert {e.digest for e in run.graph.experts[0]} <= done
    assert run.graph.merged[0].digest not in done
    stamps = manifests(run.store)
    resumed = opened(values, tmp_path / "runs" / "pico")
    resumed.execute([resumed.graph.merged[0]])
    assert {digest: stamp for digest, stamp in manifests(run.store).items() if digest in stamps} == stamps
    ours, theirs = (r.folder / "merged" / "unet" / WEIGHTS_NAME for r in (resumed, finished))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_two_processes_train_the_same_experts_to_the_bit(finished: Run, values: Values, tmp_path: Path) -> None:
    run = opened(changed(values, {"runtime.jobs": 2}), tmp_path / "runs" / "pico")
    run.execute(run.graph.experts[0])
    for ours, theirs in zip(run.graph.experts[0], finished.graph.experts[0], strict=True):
        for name in (WEIGHTS_NAME, projection.FILE):
            paths = [r.store.folder(node.key) / "unet" / name for r, node in ((run, ours), (finished, theirs))]
            assert paths[0].read_bytes() == paths[1].read_bytes()


def test_out_folder_of_another_recipe_is_a_user_error(finished: Run, values: Values) -> None:
    with pytest.raises(UserError, match="holds another recipe"):
        opened(changed(values, {"decouple.learning_rate": 5e-3}), finished.folder).execute()
    assert load(str(finished.folder)).recipe == finished.recipe


# other shapes of a run


def test_run_without_a_method_serves_the_ensemble_and_still_reports(again: Run, values: Values) -> None:
    before = manifests(again.store)
    run = executed(changed(values, {"merge.method": "none"}), again.folder.parent / "unmerged")
    rows = read_table(run.folder / "table.json")
    assert [row["model"] for row in rows] == ["base", "all-timesteps", "ensemble", "training images"]
    assert not (run.folder / "merged").exists()
    assert (run.folder / "report.html").is_file()
    made = {node.label for node in run.graph.nodes if node.digest not in before}
    assert made == {"cost of serving"}  # everything else was shared with the run beside it


def test_run_without_controls_still_reports(again: Run, values: Values) -> None:
    run = executed(changed(values, {"evaluate.controls": []}), again.folder.parent / "uncontrolled")
    names = [row["model"] for row in read_table(run.folder / "table.json")]
    assert names == ["base", "ensemble", "merged-uniform", "merged", "training images"]


def test_one_range_runs_to_its_table(again: Run, values: Values) -> None:
    run = executed(changed(values, {"decouple.num_ranges": 1}), again.folder.parent / "one")
    rows = {row["model"]: row["metrics"] for row in read_table(run.folder / "table.json")}
    assert list(rows) == [*MODELS, "training images"]
    assert rows["ensemble"]["loss"]["mean"] == rows["all-timesteps"]["loss"]["mean"]
    assert rows["merged-uniform"]["loss"]["mean"] == pytest.approx(rows["all-timesteps"]["loss"]["mean"], rel=1e-6)
    assert rows["ensemble"]["parameters"]["mean"] == rows["base"]["parameters"]["mean"]


@pytest.mark.slow
def test_run_from_scratch_with_two_seeds_and_all_controls(values: Values, tmp_path: Path) -> None:
    unet = {"sample_size": 8, "block_out_channels": [4, 8], "norm_num_groups": 2}
    scratch = {
        "model": {},
        "pretrain": {"total_steps": 2, "train_batch_size": 4, "unet": unet, "scheduler": {"num_train_timesteps": 20}},
        "extractor": {"pretrained": None, "channels": 4, "features": 8, "total_steps": 3},
        "seeds": [3, 4],
    }
    controls = {"evaluate.controls": ["all-timesteps", "soup", "all-timesteps-searched"], "merge.search": "none"}
    run = executed(changed({**values, **scratch}, controls), tmp_path / "runs" / "scratch")
    rows = {row["model"]: row["metrics"] for row in read_table(run.folder / "table.json")}
    assert list(rows) == ["base", "all-timesteps", "all-timesteps-searched", "soup", "ensemble", "merged-uniform",
                          "merged", "training images"]  # fmt: skip
    assert rows["base"]["loss"]["spread"] is None  # one base, the same points
    assert "_name_or_path" not in json.loads((run.folder / "base" / "unet" / "config.json").read_text())
    assert (run.folder / "base" / "trained_on.yaml").read_text() == "held_out: 0.4\nsource: digits\n"
    assert rows["ensemble"]["loss"]["spread"] > 0.0
    assert rows["merged"]["FD(digits-cnn) DDIM-2"]["seeds"] == [3, 4]
    for seed in (3, 4):
        merged = run.folder / f"merged-seed{seed}"
        assert {path.name for path in merged.iterdir()} == {
            "README.md", "manifest.json", "merge.json", "model_index.json", "scheduler", "unet"
        }  # fmt: skip
        shapes = [
            {key: tuple(value.shape) for key, value in load_state(folder / "unet" / WEIGHTS_NAME).items()}
            for folder in (merged, run.folder / "base")
        ]
        assert shapes[0] == shapes[1]
        assert len(list((run.folder / f"experts-seed{seed}").iterdir())) == 2


# cleaning up


def test_clean_removes_what_no_run_refers_to_and_keeps_the_rest(again: Run, values: Values) -> None:
    runs, store = again.folder.parent, again.store
    other = opened(changed(values, {"merge.search": "none", "merge.weights": [0.2, 0.3]}), runs / "given")
    other.execute([other.graph.merged[0]])
    own = {(n.stage, n.digest) for n in other.graph.nodes} - {(n.stage, n.digest) for n in again.graph.nodes}
    before = set(manifests(store))
    assert clean(store, referenced(runs), dry_run=False) == []
    shutil.rmtree(runs / "given")
    doomed = [(path.parent.name, path.name) for path, _ in clean(store, referenced(runs), dry_run=True)]
    assert set(manifests(store)) == before
    assert doomed == [("merge", other.graph.merged[0].digest)]
    assert set(doomed) <= own
    removed = clean(store, referenced(runs), dry_run=False)
    assert [path.name for path, _ in removed] == [other.graph.merged[0].digest]
    assert set(manifests(store)) == before - {other.graph.merged[0].digest}
    assert all(size > 4 * 10_709 for _, size in removed)
