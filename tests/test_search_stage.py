"""Every search as a stage of the pico recipe: it resumes, its weights reach the merge, the report split is unseen."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import make_pico_values
from deme_diffusion.artefacts import Store
from deme_diffusion.cli import main
from deme_diffusion.config import Recipe
from deme_diffusion.data.splits import Split
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.objectives import FixedNoiseObjective, FrechetObjective
from deme_diffusion.files import read_jsonl
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.search import Journal, Trial, best_so_far
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.table import method
from deme_diffusion.pipeline import needs
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.merges import HowToMerge
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.searching import SEARCH, TRIALS, Asked
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.report.page import render_page
from deme_diffusion.weights import load_state

SMALL = {"gradient_steps": 3, "gradient_batch_size": 40, "max_evaluations": 28, "grid_values": [0.0, 0.5]}


class Stop(Exception):
    """A signal."""


@pytest.fixture(scope="module")
def values(pico_pipeline: Path) -> dict[str, Any]:
    found = make_pico_values(pico_pipeline)
    found["evaluate"]["loss"]["num_images"] = 20
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> Store:
    """The experts, trained once."""
    store = Store(tmp_path_factory.mktemp("search") / "store")
    graph = Graph(Recipe.model_validate(values))
    stages = Stages(graph, store)
    for node in graph.needed(graph.experts[0]):
        store.produce(node.key, stages.make(node))
    return store


def stages_of(store: Store, values: dict[str, Any], **merge: Any) -> tuple[Stages, Node]:
    changed = copy.deepcopy(values)
    changed["merge"] |= {**SMALL, **merge}
    graph = Graph(Recipe.model_validate(changed))
    return Stages(graph, store), graph.searches[0]


@pytest.mark.parametrize(
    "merge",
    [
        {"search": "gradient"},
        {"search": "gradient", "granularity": "layer", "start": "zero"},
        {"search": "cma_es", "objective": "relative_loss", "finalists": 2},
        {"search": "cma_es", "method": "ties"},
        {"search": "tpe", "objective": "loss"},
        {"search": "grid", "objective": "loss", "method": "dare_linear", "options": {"density": 0.9}},
        {"search": "least_squares", "gauss_newton_rounds": 1, "keep": {"conv_out.*": "base"}},
        {"search": "gradient", "weights_for": {"mid_block.*": [0.1, 0.2]}},
    ],
)
def test_search_that_was_interrupted_ends_as_one_that_was_not(
    merge: dict[str, Any], store: Store, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, node = stages_of(store, values, **merge)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    result = stages.make(node)(whole)
    assert result is not None
    count, ask = len(read_jsonl(whole / TRIALS)), Journal._ask
    for after in (1, count // 2, count - 1):
        stop_after(after, monkeypatch)
        with pytest.raises(Stop):
            stages.make(node)(parts)
        assert len(read_jsonl(parts / TRIALS)) == after
        monkeypatch.setattr(Journal, "_ask", ask)
    assert stages.make(node)(parts) == result
    for name in (SEARCH, TRIALS):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    found = json.loads((whole / SEARCH).read_text())
    fixed = bool({"keep", "weights_for"} & set(merge))
    source = "w = 0, with what the recipe fixes" if fixed else "w = 0"
    first = {"weights": [0.0, 0.0], "source": source, "value": found["value_before"]}
    assert {**found["trials"][0], **({"value": found["value_before"]} if fixed else {})} == first
    assert (
        found["value"] == min(trial["value"] for trial in found["trials"]) == best_so_far(whole / TRIALS)["FD"]["value"]
    )
    assert len(found["trials"]) > 4


def stop_after(records: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Journal._ask

    def ask(self: Journal, *rest: Any) -> Any:
        if len(read_jsonl(self.path)) >= records:
            raise Stop
        return real(self, *rest)

    monkeypatch.setattr(Journal, "_ask", ask)


def test_weights_by_layer_reach_the_merge_and_the_page(
    store: Store, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(trials: list[Trial]) -> Trial:
        return next((trial for trial in trials if trial.source == "gradient"), trials[0])

    monkeypatch.setattr("deme_diffusion.pipeline.searching.best", ended)
    stages, node = stages_of(store, values, search="gradient", granularity="block", gradient_learning_rate=0.3)
    merged = stages.graph.merged[0]
    for each in (node, merged):
        store.produce(each.key, stages.make(each))
    found = store.find(node.key)
    assert found is not None
    rules = {pattern: tuple(row) for pattern, row in found.results["rules"].items()}
    assert len(set(rules.values())) > 2
    weights = MergeWeights(tuple(found.results["weights"]), rules)
    paths = [stages.component_folder(node.parents[f"expert {i}"]) for i in range(2)]
    with Merger(stages.component_folder(stages.graph.base), paths) as merger:
        expected = merger.state(weights)
    written = load_state(stages.component_folder(merged) / "diffusion_pytorch_model.safetensors")
    assert all(written[key].equal(expected[key]) for key in expected)
    content = {"recipe": "pico", "search": json.loads((found.folder / SEARCH).read_text())}
    assert "gradient" in render_page(content)


@pytest.mark.parametrize(
    "merge, message",
    [
        ({"search": "gradient", "method": "ties"}, "gradient: it needs derivatives"),
        ({"search": "least_squares", "method": "tsv"}, "least_squares: it needs derivatives"),
        ({"search": "grid", "method": "average"}, "average takes no weights"),
        ({"search": "tpe", "max_evaluations": 4}, "more than merge.max_evaluations=4"),
    ],
)
def test_search_that_cannot_be_made_stops_the_graph(
    merge: dict[str, Any], message: str, store: Store, values: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        stages_of(store, values, **merge)


def test_settings_that_a_search_does_not_use_leave_its_key(store: Store, values: dict[str, Any]) -> None:
    plain = {"grid_values": [0.0, 0.25, 0.5], "max_evaluations": 128, "gradient_steps": 10, "gradient_batch_size": 256}

    def digest(**merge: Any) -> str:
        return stages_of(store, values, **{**plain, **merge})[1].digest

    assert digest() == digest(
        grid_values=[0.0], sigma=0.9, finalists=1, start="zero", objective="loss", gradient_steps=1
    )
    assert digest() != digest(bounds=[0.0, 1.0])
    assert digest() != digest(objective="relative_loss") != digest(gauss_newton_rounds=1)
    gradient = digest(search="gradient")
    assert gradient == digest(search="gradient", sigma=0.9, scales=[2.0])
    assert len({gradient, digest(search="gradient", start="zero"), digest(search="gradient", max_evaluations=99)}) == 3
    assert digest(search="cma_es", method="ties") != digest(search="cma_es")
    assert digest(keep={"conv_out.*": "base"}) != digest() != digest(weights_for={"conv_out.*": [0.0, 1.0]})


class Unseen(dict[str, Any]):
    """The splits, of which nobody may have the report split."""

    def __getitem__(self, name: str) -> Any:
        assert name != "report", "the report split was looked up"
        return super().__getitem__(name)


@pytest.mark.parametrize(
    "merge",
    [
        {"search": "least_squares"},
        {"search": "least_squares", "objective": "relative_loss", "gauss_newton_rounds": 1},
        {"search": "grid"},
        {"search": "gradient"},
        {"search": "cma_es", "objective": "loss"},
        {"search": "tpe"},
        {"search": "grid", "method": "fisher", "fisher_samples": 4},
    ],
)
def test_no_search_sees_the_report_split(
    merge: dict[str, Any], store: Store, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, node = stages_of(store, values, **merge)
    stages.__dict__["splits"] = Unseen(stages.splits)
    looked, view = set[str](), Split.view

    def watched(self: Split, *rest: Any) -> Any:
        looked.add(self.name)
        return view(self, *rest)

    monkeypatch.setattr(Split, "view", watched)
    for each in stages.graph.needed([node]):
        if each.stage == "fisher":
            store.produce(each.key, stages.make(each))
    assert looked <= {"train"}
    looked.clear()
    stages.make(node)(tmp_path)
    assert looked == {"search"}
    with pytest.raises(AssertionError, match="looked up"):
        stages.splits["report"]


def test_objective_refuses_the_report_split(store: Store, values: dict[str, Any], tmp_path: Path) -> None:
    stages, node = stages_of(store, values, search="gradient")
    with stages._merger(node) as merger, pytest.raises(UserError, match="only for the table"):
        asked = Asked(stages, node, merger, tmp_path / "other.jsonl")
        noise = stages.fixed_noise("report", [[[0, 20]]])
        FixedNoiseObjective(noise, asked.shell, [], asked.materialise, derivative=asked.differential)


@pytest.mark.parametrize(
    "merge",
    [
        {"search": "gradient"},
        {"search": "gradient", "start": "zero", "gradient_batch_size": 20},
        {"search": "gradient", "gradient_steps": 7, "max_evaluations": 99},
        {"search": "cma_es"},
        {"search": "tpe", "objective": "loss"},
        {"search": "cma_es", "method": "ties", "objective": "loss"},
        {"search": "tpe", "method": "dare_linear"},
        {"search": "least_squares", "scales": [0.5, 2.0]},
        {"search": "least_squares", "scales": [0.5, 2.0], "keep": {"conv_out.*": "base"}},
        {"search": "grid", "objective": "loss"},
        {"search": "grid", "grid_values": [0.1, 0.3]},
        {"search": "grid", "method": "della", "grid_values": [0.0, 0.2, 0.3]},
    ],
)
def test_estimate_is_what_a_search_asks(
    merge: dict[str, Any], store: Store, values: dict[str, Any], tmp_path: Path
) -> None:
    stages, node = stages_of(store, values, **merge)
    cost = needs.model_cost(stages.graph)
    assert cost is not None
    stages.make(node)(tmp_path)
    asked = read_jsonl(tmp_path / TRIALS)
    step = 3.0 * min(1.0, stages.recipe.merge.gradient_batch_size / 40)
    worth = {"value": 1.0, "normal equations": 3.0}
    losses = sum(
        (step if "step" in record else 3.0) if record["kind"] == "gradient" else worth[record["kind"]]
        for record in asked
        if record["objective"] != "FD"
    )
    scored = sum(record["objective"] == "FD" for record in asked)
    assert scored + losses <= stages.recipe.merge.max_evaluations
    assert needs.flops(stages.graph, node, cost) / cost.flops == pytest.approx(scored * 16 * 2 + losses * 20 * 2)


# what the recipe fixes, what cannot be used, what is interrupted


@pytest.mark.parametrize("fixes", [{"keep": {"conv_out.*": 1}}, {"weights_for": {"conv_out.*": [0.9, 0.9]}}])
def test_base_itself_is_what_a_search_is_compared_with(
    fixes: dict[str, Any], store: Store, values: dict[str, Any], tmp_path: Path
) -> None:
    base = found_by(store, values, tmp_path / "plain", search="least_squares")["value_before"]
    found = found_by(store, values, tmp_path / "fixed", search="least_squares", objective="relative_loss", **fixes)
    first = found["trials"][0]
    assert (found["value_before"], first["source"]) == (base, "w = 0, with what the recipe fixes")
    assert first["value"] != base
    stages, node = stages_of(store, values, search="least_squares", objective="relative_loss", **fixes)
    with stages._merger(node) as merger:
        asked = Asked(stages, node, merger, tmp_path / "asked.jsonl")
        whole = MergeWeights((0.0, 0.0), keep={"*": "base"})
        assert asked.loss.value(whole) == pytest.approx(1.0, abs=1e-12)
        assert asked.loss.value([0.0, 0.0]) != pytest.approx(1.0, abs=1e-6)


def found_by(store: Store, values: dict[str, Any], folder: Path, **merge: Any) -> dict[str, Any]:
    stages, node = stages_of(store, values, **merge)
    folder.mkdir()
    stages.make(node)(folder)
    found: dict[str, Any] = json.loads((folder / SEARCH).read_text())
    return found


@pytest.mark.parametrize(("far", "told"), [(-1.0, True), (1e9, False)])
def test_weights_far_beyond_the_experts_are_told(
    far: float,
    told: bool,
    store: Store,
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("deme_diffusion.pipeline.searching.FAR", far)
    found_by(store, values, tmp_path / "x", search="least_squares")
    assert ("goes far beyond its expert" in caplog.text) == told


@pytest.mark.parametrize("objective", ["fd", "loss"])
def test_weights_of_no_model_are_told_and_passed_over(
    objective: str, store: Store, values: dict[str, Any], tmp_path: Path
) -> None:
    found = found_by(store, values, tmp_path / "x", search="grid", objective=objective, grid_values=[0.1, 1e39])
    assert found["value"] is not None
    unusable = [trial for trial in found["trials"] if trial["value"] is None]
    assert [max(trial["weights"]) for trial in unusable] == ([1e39] * 3 if objective == "fd" else [])
    assert all(trial["reason"] for trial in unusable)
    assert any(trial["weights"] == [0.1, 0.1] and trial["value"] for trial in found["trials"])
    assert ("unusable" in render_page({"recipe": "pico", "search": found})) == (objective == "fd")


def test_search_whose_base_cannot_be_scored_is_refused_and_asks_again(
    store: Store, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, node = stages_of(store, values, search="least_squares")
    real = FrechetObjective.value

    def nothing(self: FrechetObjective, weights: Any) -> float:
        raise UserError("the model samples non-finite images")

    monkeypatch.setattr(FrechetObjective, "value", nothing)
    with pytest.raises(UserError, match="the base itself cannot be scored: the model samples non-finite images"):
        stages.make(node)(tmp_path)
    monkeypatch.setattr(FrechetObjective, "value", real)
    stages.make(node)(tmp_path)
    assert (tmp_path / SEARCH).is_file()


def test_interrupted_command_says_how_to_use_the_best_so_far(
    store: Store,
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = copy.deepcopy(values)
    changed["merge"] |= {**SMALL, "search": "grid", "grid_values": [0.0, 0.7]}
    recipe = tmp_path / "pico.yaml"
    recipe.write_text(yaml.safe_dump(changed))
    real, asked = FrechetObjective.value, list[float]()

    def interrupted(self: FrechetObjective, weights: Any) -> float:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(real(self, weights))
        return asked[-1]

    monkeypatch.setattr(FrechetObjective, "value", interrupted)
    monkeypatch.setattr(sys, "argv", ["deme", "search", str(recipe), "--out", str(store.root.parent / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 130
    weights = [[0.0, 0.0], [0.5, 0.5], [1.0, 0.0]][asked.index(min(asked))]
    assert f"best so far by FD ({min(asked):.6g}) is merge.search=none 'merge.weights={weights}'" in said
    Graph(Recipe.model_validate({**values, "merge": {"search": "none", "weights": weights}}))


def test_rules_of_a_recipe_keep_their_order_whatever_was_found() -> None:
    rules = {"up_blocks.*": (0.1, 0.2), "up_blocks.1.*": (0.7, 0.8)}
    how = HowToMerge(method("task_arithmetic"), rules=rules)
    found = {"up_blocks.1.*": (9.0, 9.0), "up_blocks.0.*": (9.0, 9.0), "mid_block.*": (0.3, 0.4)}
    weights = how.weights((0.0, 0.0), found)
    for key in ("up_blocks.1.x", "up_blocks.0.x"):
        assert weights.at(key) == how.weights((0.0, 0.0)).at(key)
    assert weights.at("mid_block.x") == (0.3, 0.4)
