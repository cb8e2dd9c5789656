"""Every search as a stage of the pico recipe: it resumes, its weights reach the merge, the report split is unseen."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import make_pico_values
from deme_diffusion.artefacts import Store
from deme_diffusion.config import Recipe
from deme_diffusion.data.splits import Split
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.objectives import FixedNoiseObjective
from deme_diffusion.files import read_jsonl
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.search import Journal, best_so_far
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.pipeline import needs
from deme_diffusion.pipeline.graph import Graph
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
    assert found["trials"][0] == {"weights": [0.0, 0.0], "source": "w = 0", "value": found["value_before"]}
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
    monkeypatch.setattr("deme_diffusion.pipeline.searching.best", lambda trials: trials[-1])  # the search's own
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
    plain = {"grid_values": [0.0, 0.25, 0.5], "max_evaluations": 128, "gradient_steps": 30, "gradient_batch_size": 256}

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


def test_no_search_sees_the_report_split(
    store: Store, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, node = stages_of(store, values, search="gradient")
    looked, view = set[str](), Split.view

    def watched(self: Split, *rest: Any) -> Any:
        looked.add(self.name)
        return view(self, *rest)

    monkeypatch.setattr(Split, "view", watched)
    stages.make(node)(tmp_path)
    assert looked == {"search"}
    with stages._merger(node) as merger, pytest.raises(UserError, match="only for the table"):
        asked = Asked(stages, node, merger, tmp_path / "other.jsonl")
        noise = stages.fixed_noise("report", [[[0, 20]]])
        FixedNoiseObjective(noise, asked.shell, [], asked.materialise, derivative=asked.differential)


@pytest.mark.parametrize(
    "merge, scored, losses",
    [
        ({"search": "gradient"}, 6, 3 + 3 + 4 * 3 + 1),  # where it begins, steps on all points, where it ends
        ({"search": "gradient", "start": "zero", "gradient_batch_size": 20}, 6, 3 + 4 * 3 / 2 + 1),
        ({"search": "cma_es"}, 4 + 21, 3),
        ({"search": "tpe", "objective": "loss"}, 4 + 3, 3 + 18),
        ({"search": "cma_es", "method": "ties", "objective": "loss"}, 4 + 3, 21),
        ({"search": "least_squares", "gauss_newton_rounds": 1}, 5, 3 + 5),
        ({"search": "grid", "objective": "loss"}, 4 + 3, 4),
    ],
)
def test_estimate_counts_what_a_search_asks(
    merge: dict[str, Any], scored: int, losses: float, store: Store, values: dict[str, Any]
) -> None:
    stages, node = stages_of(store, values, **merge)
    cost = needs.model_cost(stages.graph)
    assert cost is not None
    images, points = 16 * 2, 20 * 2
    assert needs.flops(stages.graph, node, cost) / cost.flops == pytest.approx(scored * images + losses * points)
