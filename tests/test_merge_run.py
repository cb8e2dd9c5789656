"""Merging as a stage of a run: every method from the same experts, what is wrong told before a training, the record."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from conftest import component, make_pico_values
from deme_diffusion import cli
from deme_diffusion.cli import show
from deme_diffusion.config import MergeSettings
from deme_diffusion.errors import UserError
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.models import projection
from deme_diffusion.pipeline import engine, merges, searching
from deme_diffusion.pipeline import stages as stages_module
from deme_diffusion.pipeline.found import lost_gain
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.recipes import Loaded, to_yaml
from deme_diffusion.recipes.checks import parse
from deme_diffusion.report.page import render_page
from deme_diffusion.report.tables import Row
from deme_diffusion.weights import WEIGHTS_NAME, State, Weights, load_state

Values = dict[str, Any]
FOUND = {"weights", "source", "value", "value_before", "objective"}
QUICK = {"num_images": 16, "scales": [1.0], "sampler": {"num_inference_steps": 2}, "fisher_samples": 5}


def with_merge(values: Values, **merge: Any) -> Values:
    return {**values, "merge": {**QUICK, **merge}}


def graph_of(values: Values, **merge: Any) -> Graph:
    return Graph(parse(with_merge(values, **merge), where="test"))


def opened(values: Values, folder: Path) -> Run:
    return open_run(Loaded(parse(values, where="test"), {}), out=folder, command="deme run pico")


@pytest.fixture(scope="module")
def values(pico_pipeline: Path) -> Values:
    return make_pico_values(pico_pipeline)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, values: Values) -> Path:
    """A folder of runs whose store holds the experts."""
    folder = tmp_path_factory.mktemp("merging") / "runs"
    run = opened(with_merge(values, search="none"), folder / "experts")
    run.execute(run.graph.experts[0])
    return folder


def merged(values: Values, runs: Path, **merge: Any) -> Run:
    """The merged model of a recipe and no more than it needs; the experts are shared with the runs before."""
    run = opened(with_merge(values, **{"search": "none", **merge}), runs / f"run-{len(list(runs.iterdir()))}")
    before = {path: path.stat().st_mtime_ns for path in (runs / "store" / "decouple").glob("*/manifest.json")}
    run.execute([run.graph.merged[0]])
    assert {path: path.stat().st_mtime_ns for path in (runs / "store" / "decouple").glob("*/manifest.json")} == before
    return run


def state_of(run: Run) -> State:
    return load_state(run.merged / "unet" / WEIGHTS_NAME)


def record_of(run: Run) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run.merged / "merge.json").read_text())
    return record


def parents_of(run: Run) -> tuple[State, list[State]]:
    experts = [load_state(run.folder / "experts" / str(i) / "unet" / WEIGHTS_NAME) for i in range(2)]
    return load_state(run.folder / "base" / "unet" / WEIGHTS_NAME), experts


# every method


@pytest.mark.parametrize("method", ["ties", "wudi", "fisher", "slerp", "average"])
def test_every_method_merges_the_same_experts(method: str, values: Values, runs: Path) -> None:
    from diffusers import DDPMPipeline

    plain, run = merged(values, runs), merged(values, runs, method=method)
    record, row = record_of(run), run.graph.merged[0].arguments["how"].method
    assert (record["method"], record["citation"]) == (method, row.source)
    assert record["weights"] == {"values": row.default_weights(2)}
    assert record["weights_source"] == f"default of {method}"
    assert record["score"] is None
    assert record["statistics"]["model"]["parameters"] == 10_709
    with safe_open(run.merged / "unet" / WEIGHTS_NAME, framework="pt") as file:
        told = json.loads(file.metadata()["deme_merge"])
    assert told["method"] == method
    assert told["experts"] == [expert.digest for expert in run.graph.experts[0]]
    ours, eq8 = state_of(run), state_of(plain)
    if method != "average":  # which is Eq. 8 with 1/N, up to rounding
        assert max(float((ours[key] - eq8[key]).abs().max()) for key in ours) > 1e-6
    unet = DDPMPipeline.from_pretrained(run.merged).unet  # stock diffusers
    assert all(torch.equal(value, ours[key]) for key, value in unet.state_dict().items())


def test_fisher_information_weighs_every_entry(values: Values, runs: Path) -> None:
    run = merged(values, runs, method="fisher", weights=[0.9, 0.3])
    files = [run.store.folder(run.graph.fisher(e, 0).key) / "fisher.safetensors" for e in run.graph.experts[0]]
    information = [{key: value.double() for key, value in load_state(file).items()} for file in files]
    base, experts = parents_of(run)
    weighed = [{key: w * f[key] for key in base} for w, f in zip((0.9, 0.3), information, strict=True)]
    ours, untouched = state_of(run), "conv_in.weight"  # no projection folds into it
    top = sum(f[untouched] * (e[untouched] - base[untouched]).double() for f, e in zip(weighed, experts, strict=True))
    expected = base[untouched] + top / (weighed[0][untouched] + weighed[1][untouched])
    torch.testing.assert_close(ours[untouched].double(), expected, rtol=0, atol=1e-7)
    assert {key for key in information[0] if key.startswith("projection.")} == {
        f"projection.{place}" for place in projection.load(run.folder / "experts" / "0" / "unet")
    }
    for file, expert, subset in zip(files, run.graph.experts[0], ([[0, 10]], [[10, 20]]), strict=True):
        with safe_open(file, framework="pt") as opened_file:
            about = json.loads(opened_file.metadata()["deme_fisher"])
        assert about == {"subset": subset, "samples": 5, "seed": 0, "expert": expert.digest}


def test_command_makes_the_files_whatever_the_method(
    values: Values, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as a recipe with method=fisher makes."""
    (tmp_path / "pico.yaml").write_text(to_yaml(parse(with_merge(values), where="test")))
    monkeypatch.setattr(
        sys, "argv", ["deme", "-q", "fisher", str(tmp_path / "pico.yaml"), "--out", str(runs / "asked")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    files = [Path(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    graph = graph_of(values, method="fisher", search="none")
    assert [file.parent.name for file in files] == [
        graph.merged[0].parents[name].digest for name in ("fisher 0", "fisher 1")
    ]
    assert all("conv_in.weight" in load_state(file) for file in files)


def test_search_scores_the_recipes_own_merge(values: Values, runs: Path) -> None:
    small = {"search": "grid", "grid_values": [0.5, 1.0], "max_evaluations": 12}
    run = merged(values, runs, method="ties", **small)
    found = json.loads((run.store.folder(run.graph.searches[0].key) / "search.json").read_text())
    record = record_of(run)
    assert record["weights"] == {"values": found["weights"]}
    assert record["weights_source"] == f"search: grid, {found['source']}"
    before = next(trial["value"] for trial in found["trials"] if not any(trial["weights"]))
    assert record["score"] == {"objective": found["objective"], "before": before, "after": found["value"]}
    plain = merged(values, runs, **small)
    others = json.loads((run.store.folder(plain.graph.searches[0].key) / "search.json").read_text())["trials"]
    assert [trial["value"] for trial in found["trials"] if any(trial["weights"])] != [
        trial["value"] for trial in others if any(trial["weights"])
    ]


def test_weights_that_a_search_found_by_layer_are_those_of_the_merge(
    values: Values, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules that the recipe gives go before them."""
    monkeypatch.setattr(searching, "best", lambda trials: next((trial for trial in trials if trial.rules), trials[0]))
    given = {"conv_out.*": [0.0, 1.0]}
    run = merged(values, runs, search="gradient", granularity="block", gradient_steps=2, weights_for=given)
    found = json.loads((run.store.folder(run.graph.searches[0].key) / "search.json").read_text())
    assert found["rules"]
    assert record_of(run)["weights"] == {"values": found["weights"], "rules": {**found["rules"], **given}}
    assert torch.equal(state_of(run)["conv_out.weight"], parents_of(run)[1][1]["conv_out.weight"])
    (line,) = run.weights_found()
    assert f"and others for {len(found['rules'] | given)} patterns, by {found['source']}" in line
    pattern = next(iter(found["rules"]))
    page = render_page({**run.content([]), "stages": []}, run.folder)
    assert "Parameters with weights of their own" in page and pattern in page


def test_run_tells_its_method_on_page_card_and_terminal(values: Values, runs: Path) -> None:
    keep = {"conv_out.*": "base"}
    run = opened(with_merge(values, method="ties", search="none", options={"density": 0.5}, keep=keep), runs / "told")
    run.execute()
    run.report()
    page, card = ((run.folder / name).read_text() for name in ("report.html", "model_card.md"))
    assert "ties (density 0.5, trim tensor)" in page
    assert "Task vectors" in page and "up_blocks.0" in page
    assert "conv_out.*" in page
    assert "Yadav et al. 2023" in card and "the base's" in card
    assert "density 0.5" in (run.merged / "README.md").read_text().replace("\\", "")
    assert run.weights_found() == [
        "merge weights of ties (density 0.5): 1 each, default of ties: merged and merged-uniform are the same model"
    ]


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        ({}, "merge weights: 0.5 each, default of task_arithmetic: merged and merged-uniform are the same model"),
        ({"weights": [0.5, 0.25]}, "merge weights: 0.5, 0.25, given"),
        ({"weights_for": {"conv_in.*": [0.0, 1.0]}},
         "merge weights: 0.5 each and others for 1 patterns, default of task_arithmetic"),
        ({"method": "average"}, "merge weights of average: none; average takes none: merged and merged-uniform are"),
    ],
)  # fmt: skip
def test_weights_without_a_search_are_told_by_whose_they_are(
    values: Values, tmp_path: Path, merge: Any, said: str
) -> None:
    (line,) = opened(with_merge(values, search="none", **merge), tmp_path / "run").weights_found()
    assert line.startswith(said) and ("same model" in line) == ("same model" in said or "average" in said)


def test_search_and_merge_print_what_was_found(
    values: Values, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = searching.best
    monkeypatch.setattr(searching, "best", lambda trials: chosen([t for t in trials if t.source == "grid"] or trials))
    run = merged(values, runs, search="grid", grid_values=[0.25, 0.5], max_evaluations=12)
    assert record_of(run)["weights_source"] == "search: grid", "the name is not said twice"
    search, node = run.graph.searches[0], run.graph.merged[0]
    show.made(run, [search, node, run.graph.experts[0][0]], True)
    told = json.loads(capsys.readouterr().out)
    found = json.loads((run.store.folder(search.key) / "search.json").read_text())
    for entry in told[:2]:
        assert {key: entry[key] for key in FOUND} == {key: found[key] for key in FOUND}
    assert not FOUND & set(told[2])
    show.made(run, [search, node], False)
    lines = capsys.readouterr().out.splitlines()
    listed = ", ".join(f"{w:.3g}" for w in found["weights"])
    assert len(lines) == 4 and lines[1] == lines[3]
    assert lines[1].startswith(f"  weights {listed}, by {found['source']}: {found['objective']}: ")
    before, after = map(float, lines[1].rpartition(": ")[2].split(" to "))
    assert (before, after) == pytest.approx((found["value_before"], found["value"]), rel=1e-3)
    plain = merged(values, runs, weights=[0.5, 0.25])
    show.made(plain, [plain.graph.merged[0]], False)
    assert capsys.readouterr().out.splitlines()[1] == "  weights 0.5, 0.25 (given)"


def fd(base: float, merged: float, split: str = "report") -> list[Row]:
    """A table with one sampler."""

    def figure(mean: float) -> Any:
        return {"mean": mean, "spread": None, "n": 100, "seeds": [0], "protocol": {"split": split}}

    return [{"model": name, "metrics": {"FD(x) DDIM-20": figure(mean), "loss": figure(mean)}}
            for name, mean in (("base", base), ("merged", merged))]  # fmt: skip


SEARCHED = {"value_before": 10.04, "value": 7.81, "trials": [{}] * 119}
LOST = "the search's gain (FD 10.04 to 7.81 on 100 images, 119 trials) did not carry over to the report split"


@pytest.mark.parametrize(
    ("rows", "found", "said"),
    [
        (fd(9.0, 9.1), SEARCHED, LOST),
        (fd(9.0, 9.0), SEARCHED, LOST),
        (fd(9.0, 8.9), SEARCHED, ""),
        (fd(9.0, 9.1, split="published"), SEARCHED, ""),
        (fd(9.0, 9.1)[:1], SEARCHED, ""),
        ([], SEARCHED, ""),
        (fd(9.0, 9.1), {**SEARCHED, "value": 10.04}, ""),
        (fd(9.0, 9.1), {**SEARCHED, "value": 10.0399999}, LOST.replace("10.04 to 7.81", "10.04 to 10.0399999")),
    ],
)
def test_gain_that_the_report_split_does_not_show_is_said(rows: list[Row], found: Any, said: str) -> None:
    assert lost_gain(found, rows, 0, 100) == said


def test_search_that_will_follow_the_noise_is_warned_of_while_it_is_left_to_do(
    values: Values, caplog: pytest.LogCaptureFixture
) -> None:
    graph = graph_of(values, search="grid", grid_values=[0.1, 0.2, 0.3, 0.4, 0.5], max_evaluations=119)
    engine._warn_of_noise(graph, [node for node in graph.nodes if node.stage != "search"])
    assert caplog.text == ""
    engine._warn_of_noise(graph, graph.nodes)
    assert caplog.text.count("FD on 16 images follows the sampling noise") == 1


def test_gain_is_looked_for_by_sampler_and_seed() -> None:
    rows = fd(9.0, 8.0)
    for row, values_of in zip(rows, ([9.0, 9.0], [8.0, 9.5]), strict=True):
        several = {**row["metrics"]["loss"], "seeds": [3, 4], "values": values_of}
        row["metrics"]["FD(x) DDPM-50"] = several  # type: ignore[assignment]
    assert lost_gain(SEARCHED, rows, 3, 100) == ""
    assert lost_gain(SEARCHED, rows, 4, 100) == f"{LOST} with DDPM-50"


# weights by pattern, tensors of one model, dtype, shards


def test_settings_of_a_merge_reach_the_model(values: Values, runs: Path) -> None:
    run = merged(
        values,
        runs,
        weights=[0.5, 0.25],
        weights_for={"conv_in.*": [0.0, 1.0]},
        keep={"conv_norm_out.*": "base", "conv_out.*": 0},
        dtype="bfloat16",
        max_shard_size="10KB",
    )
    base, experts = parents_of(run)
    with Weights(run.merged / "unet") as ours:
        assert len(ours.files) > 2
        assert {ours.dtype(key) for key in ours.keys()} == {torch.bfloat16}  # noqa: SIM118
        for key, theirs in (
            ("conv_norm_out.weight", base),
            ("conv_out.weight", experts[0]),
            ("conv_in.bias", experts[1]),
        ):
            assert torch.equal(ours.tensor(key), theirs[key].bfloat16())
    told = {"rules": {"conv_in.*": [0.0, 1.0]}, "keep": {"conv_norm_out.*": "base", "conv_out.*": 0}}
    artefact = run.store.find(run.graph.merged[0].key)
    assert artefact is not None
    assert artefact.results == {"weights": [0.5, 0.25], **told}
    record = record_of(run)
    assert record["weights"] == {"values": [0.5, 0.25], **told}
    assert record["dtype"] == "bfloat16"
    assert record["shards"] == sorted(file.name for file in (run.merged / "unet").glob("*.safetensors"))


def test_order_of_patterns_is_part_of_a_digest(values: Values) -> None:
    one, other = {"conv_*": [0.0, 1.0]}, {"conv_in.*": [1.0, 0.0]}
    first, second = (graph_of(values, search="none", weights_for={**a, **b}) for a, b in ((one, other), (other, one)))
    assert first.merged[0].digest != second.merged[0].digest


@pytest.mark.parametrize(
    "change",
    [
        {"method": "ties"},
        {"method": "dare_linear", "options": {"seed": 1}},
        {"weights_for": {"conv_in.*": [0.0, 1.0]}},
        {"keep": {"conv_in.*": "base"}},
        {"dtype": "float16"},
        {"max_shard_size": "1GB"},
    ],
)
def test_what_shapes_a_merge_is_in_its_digest_and_the_experts_are_shared(values: Values, change: Values) -> None:
    plain, changed = graph_of(values, search="none"), graph_of(values, search="none", **change)
    assert changed.merged[0].digest != plain.merged[0].digest
    assert [e.digest for e in changed.experts[0]] == [e.digest for e in plain.experts[0]]


def test_options_spelled_out_at_the_methods_defaults_change_no_digest(values: Values) -> None:
    plain = graph_of(values, search="none", method="ties")
    spelled = graph_of(values, search="none", method="ties", options={"density": 0.2, "trim": "tensor"})
    assert spelled.merged[0].digest == plain.merged[0].digest


def test_digests_at_the_defaults_are_those_of_the_runs_before() -> None:
    """From before methods had options: nobody's experts, searches or samples are orphaned by new settings."""
    graph = Graph(parse({}, where="test"))
    samples = {node.label: node.digest for node in graph.of_stage("sample")}
    assert [node.digest for node in graph.experts[0]] == [
        "94dfa0636bbed396", "6b41fc4d01ec7ccc", "ee0a71c39d32795d", "b96d203bf6ce7826"
    ]  # fmt: skip
    assert graph.searches[0].digest == "f205fe1854a3201c"
    assert samples["sample base DDIM-50 #0"] == "fcbbdbea1082ba36"
    assert samples["sample ensemble DDIM-50 #0"] == "c8cc11368b180cc3"


# the rows beside `merged`


def made_of(graph: Graph, name: str) -> Node:
    node = next(served for served in graph.served[0] if served.name == name).parts[0]
    assert isinstance(node, Node)
    return node


def test_controls_merge_as_the_recipe_does_where_that_means_something(values: Values) -> None:
    controls = {"evaluate": {**values["evaluate"], "controls": ["all-timesteps", "soup", "all-timesteps-searched"]}}
    keep, rules = {"conv_in.*": "base", "conv_out.*": 1}, {"mid_block.*": [1.0, 0.0]}
    graph = graph_of({**values, **controls}, method="slerp", search="none", keep=keep, weights_for=rules)
    ways = {name: made_of(graph, name).arguments["how"] for name in ("merged", "soup", "all-timesteps-searched")}
    assert [how.method.name for how in ways.values()] == ["slerp", "slerp", "task_arithmetic"]
    alone = ways["all-timesteps-searched"]
    assert (alone.keep, alone.rules) == ({"conv_in.*": "base"}, {})
    uniform = made_of(graph, "merged-uniform")
    assert uniform.arguments["how"].rules == {}  # else it would not be uniform
    assert uniform.key.settings["weights"] == [0.5, 0.5]
    ties = graph_of(values, method="ties", search="none")
    assert made_of(ties, "merged-uniform") is made_of(ties, "merged")
    assert made_of(ties, "merged").key.settings["weights"] == [1.0, 1.0]


def test_one_fisher_information_an_expert_and_only_where_it_is_asked_for(values: Values) -> None:
    assert not list(graph_of(values).of_stage("fisher"))
    graph = graph_of(values, method="fisher", search="none")
    assert len(list(graph.of_stage("fisher"))) == 2
    assert {"data", "expert"} == set(next(graph.of_stage("fisher")).parents)
    plain = graph_of(values)
    assert [node.digest for node in plain.fishers()] == [node.digest for node in graph.of_stage("fisher")]
    more = graph_of(values, method="fisher", search="none", fisher_samples=6)
    assert [n.digest for n in more.of_stage("fisher")] != [n.digest for n in graph.of_stage("fisher")]


# what a search chose, in words


@pytest.mark.parametrize(
    ("weights", "method", "said"),
    [
        (MergeWeights((0.0, 1.0)), "task_arithmetic", ": merged is expert 1 alone"),
        (MergeWeights((0.0, 1.0)), "slerp", ": merged is expert 1 alone"),
        (MergeWeights((0.0, 1.0)), "ties", ""),  # trimmed
        (MergeWeights((0.0, 1.0)), "average", ""),
        (MergeWeights((0.0, 0.5)), "task_arithmetic", ""),
        (MergeWeights((0.0, 0.0)), "ties", ": merged is the base itself"),
        (MergeWeights((0.0, 0.0), {"conv_in.*": (0.0, 1.0)}), "task_arithmetic", ""),
        (MergeWeights((0.0, 1.0), {}, {"conv_in.*": 0}), "task_arithmetic", ""),
    ],
)
def test_one_hot_weights_are_one_expert_only_for_some_methods(weights: MergeWeights, method: str, said: str) -> None:
    assert merges.degenerate(weights, method) == said


# what is wrong, told before a training


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"method": "ties", "options": {"rank": 0.5}}, "merge.options.rank: method ties takes density, trim"),
        ({"options": {"density": 0.5}}, "merge.options.density: method task_arithmetic takes no options"),
        ({"weights_for": {"conv_in.*": [1.0]}}, "merge.weights_for: conv_in.*: 1 weights for decouple.num_ranges=2"),
        ({"keep": {"conv_in.*": 2}}, "merge.keep: conv_in.*: expert 2; base, or one from 0 to 1"),
        ({"method": "average", "search": "grid"}, "merge.search=grid: method average takes no weights"),
        ({"method": "average", "weights": [0.5, 0.5]}, "merge.weights: method average takes no weights"),
        ({"weights": [0.5]}, "merge.weights has 1 values for decouple.num_ranges=2"),
    ],
)
def test_settings_that_do_not_agree_are_refused_at_a_dry_run(
    merge: Values,
    message: str,
    values: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import yaml

    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(with_merge(values, **{"search": "none", **merge})))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["deme", "run", "wrong.yaml", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_method_for_two_experts_is_refused_for_three(values: Values) -> None:
    values = {**values, "decouple": {**values["decouple"], "num_ranges": 3}}
    with pytest.raises(UserError, match="method slerp merges 2 experts, 3 are given"):
        graph_of(values, method="slerp", search="none")


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"keep": {"conv_inn.*": "base"}}, r"conv_inn\.\*: matches no parameter.*conv_in\."),
        ({"weights_for": {"nothing": [0.1, 0.2]}}, "nothing: matches no parameter"),
        ({"max_shard_size": "large"}, "max_shard_size: 'large' is no size"),
    ],
)
@pytest.mark.parametrize("base", ["given", "pretrained"])
def test_pattern_that_matches_nothing_is_told_before_the_first_training(
    base: str, merge: Values, message: str, values: Values, tmp_path: Path
) -> None:
    if base == "pretrained":
        unet = {"sample_size": 8, "block_out_channels": [4, 8], "norm_num_groups": 2}
        values = {**values, "model": {}, "pretrain": {"total_steps": 2, "unet": unet}}
    run = opened(with_merge(values, search="none", **merge), tmp_path / "runs" / "pico")
    with pytest.raises(UserError, match=message):
        run.execute()
    assert not list((tmp_path / "runs" / "store").glob("*/*/manifest.json"))


def test_base_with_projections_is_refused_before_anything_runs(values: Values, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(values["model"]["pretrained"], base)
    projection.save(base / "unet", {"mid_block": torch.zeros(8, 8)})
    with pytest.raises(UserError, match=r"projection\.safetensors: a base must be whole without"):
        graph_of({**values, "model": {"pretrained": str(base)}})


# interrupted


def test_interrupted_merge_of_a_sharded_base_leaves_nothing_that_looks_whole(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(values["model"]["pretrained"], base)
    config, state = (base / "unet" / "config.json").read_bytes(), load_state(base / "unet" / WEIGHTS_NAME)
    (base / "unet" / WEIGHTS_NAME).unlink()
    component(base / "unet", state, shards=3)
    (base / "unet" / "config.json").write_bytes(config)
    values = {**values, "model": {"pretrained": str(base)}}
    run = opened(with_merge(values, search="none"), tmp_path / "runs" / "pico")
    folder, writing = run.store.folder(run.graph.merged[0].key), stages_module.write_into

    def cut(*arguments: Any, **options: Any) -> None:
        writing(*arguments, **options)
        raise KeyboardInterrupt

    for place in ("write_into", "take_over"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(stages_module, place, cut if place == "write_into" else interrupted_take_over)
            run.execute([run.graph.merged[0]])
        assert not (folder / "model_index.json").exists()
        assert run.store.status(run.graph.merged[0].key) == "partial"
    assert not (folder / "unet").is_symlink()
    run.execute([run.graph.merged[0]])
    assert len(list((folder / "unet").glob("*.safetensors"))) == 3
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "manifest.json", "merge.json", "model_index.json", "scheduler", "unet"
    }  # fmt: skip


def interrupted_take_over(whole: Path, folder: Path, *, last: str) -> None:
    """All but the last file are in place."""
    for part in whole.iterdir():
        if part.name != last:
            part.replace(folder / part.name)
    raise KeyboardInterrupt


# an expert's folder


def test_expert_says_what_it_is_and_how_to_load_it(values: Values, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = merged(values, runs)
    folder = run.folder / "experts" / "0"
    text = (folder / "README.md").read_text()
    assert "projection.safetensors" in text and "a component, and no pipeline" in text
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    matrices = projection.load(folder / "unet")
    assert projection.attached(names["unet"]).keys() == matrices.keys() != set()


def test_settings_that_a_merge_says_in_its_own_way_exist() -> None:
    assert set(merges.SAID) <= set(MergeSettings.model_fields)
