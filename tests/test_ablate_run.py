"""An experiment trains nothing twice, goes on after failures and interruptions, and says what every arm gave."""

import copy
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import make_pico_values
from deme_diffusion.ablate.experiment import Experiment
from deme_diffusion.ablate.folder import begin, unused
from deme_diffusion.ablate.opening import check
from deme_diffusion.ablate.outcome import _labels, content, planned
from deme_diffusion.ablate.plan import Ablation, Plan
from deme_diffusion.ablate.running import Findings, carried_out, opened_plan, run_plan
from deme_diffusion.ablate.writing import to_yaml
from deme_diffusion.artefacts import Artefact, Store
from deme_diffusion.clean_up import clean, referenced
from deme_diffusion.config import Recipe
from deme_diffusion.decoupling import train
from deme_diffusion.errors import Interrupted, MachineError, UserError
from deme_diffusion.evaluation import cost
from deme_diffusion.pipeline import stages as stages_module
from deme_diffusion.pipeline.engine import Engine
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import open_run
from deme_diffusion.pipeline.tasks import Queue, Task
from deme_diffusion.recipes import Loaded, load
from deme_diffusion.report.ablation import verdicts
from deme_diffusion.report.ablation_record import check_record
from deme_diffusion.report.tables import read_table

Values = dict[str, Any]
REMOVED = Ablation("No merging", "merging", "REMOVE", change={"merge.method": "none", "merge.search": "none"})
LONGER = {"decouple.total_steps": 6}
TIMED = ("latency (ms)", "load time (ms)", "peak memory (MB)")


def arms(name: str = "Arms", **changes: Mapping[str, Any]) -> Ablation:
    """An ablation with an arm of exact change for each text."""
    return Ablation(name, "training", "REPLACE", list(changes), changes=changes)


@pytest.fixture
def recipe(pico_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pico recipe as a file, with uniform weights; what serving costs and takes is measured once, for speed."""
    monkeypatch.setattr(cost, "REPEATS", 1)
    monkeypatch.setattr(cost, "LOADS", 1)
    monkeypatch.setattr(train, "check_memory", lambda *given, **named: None)
    pico_values["merge"]["search"] = "none"
    return written(pico_values, tmp_path)


def written(values: Values, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "pico.yaml").write_text(yaml.safe_dump(values))
    return folder / "pico.yaml"


def opened(recipe: Path, *ablations: Ablation) -> Experiment:
    return opened_plan(Plan("why", list(ablations)), str(recipe), [], out=recipe.parent / "runs" / "pico")


def run(recipe: Path, *ablations: Ablation) -> Findings:
    return run_plan(Plan("why", list(ablations)), recipe, out=recipe.parent / "runs" / "pico")


def statuses(found: Findings) -> dict[str, str]:
    return {arm["label"]: arm["status"] for part in found.content["ablations"] for arm in part["arms"]}


def record(folder: Path) -> dict[str, Any]:
    """What `ablation.json` in a folder holds."""
    content: dict[str, Any] = json.loads((folder / "ablation.json").read_text())
    return content


def arm(found: Findings, label: str) -> dict[str, Any]:
    return next(arm for part in found.content["ablations"] for arm in part["arms"] if arm["label"] == label)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each stage was made, by its digest, and each kind of stage, by its name."""
    counted: Counter[str] = Counter()
    make = stages_module.Stages.make

    def counting(self: Any, node: Node) -> Any:
        inner = make(self, node)

        def called(folder: Path) -> Any:
            counted.update([node.digest, node.stage])
            return inner(folder)

        return called

    monkeypatch.setattr(stages_module.Stages, "make", counting)
    yield counted


# what is shared


def test_nothing_is_made_twice_and_a_plan_about_merging_trains_one_runs_steps(recipe: Path, made: Counter[str]) -> None:
    methods = {
        f"{method} {search}": {"merge.method": method, "merge.search": search}
        for method in ("task_arithmetic", "ties", "dare_linear")
        for search in ("grid", "none")
        if (method, search) != ("task_arithmetic", "none")  # the baseline
    }
    found = run(recipe, arms(**methods), REMOVED)
    assert set(statuses(found).values()) == {"done"}
    assert made["decouple"] == 2, "the baseline's experts"
    assert max(count for digest, count in made.items() if len(digest) == 16) == 1
    assert found.content["steps"] == {"shared": 4, "independent": 4 * 7}
    assert found.content["seconds"]["shared"] < found.content["seconds"]["independent"]


def test_arms_with_equal_subsets_share_their_training(recipe: Path, made: Counter[str]) -> None:
    edges = {"decouple.division": "explicit", "decouple.edges": [10]}  # where the uniform division has it as well
    other = {"decouple.division": "explicit", "decouple.edges": [5]}
    again = {**other, "merge.method": "average"}
    found = run(recipe, arms(same=edges, other=other, again=again))
    assert statuses(found) == {"same": "same_as_baseline", "other": "done", "again": "done"}
    assert made["decouple"] == 4
    assert found.content["steps"] == {"shared": 8, "independent": 12}


def test_a_setting_that_plays_no_part_leaves_the_baseline(recipe: Path) -> None:
    there = opened(recipe, arms(idle={"decouple.overlap": 0.5}, wrong={"decouple.num_ranges": 40}), REMOVED)
    idle, wrong = there.parts[0].trials
    assert (idle.arm.status, wrong.arm.status) == ("same_as_baseline", "not_executable")
    assert "plays no part" in idle.arm.reason and "40" in wrong.arm.reason
    assert there.steps() == {"shared": 4, "independent": 8}
    assert not there.folder.exists(), "opening makes nothing"


def test_the_baseline_is_the_recipes_own_run(
    recipe: Path, made: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = open_run(load(str(recipe)), out=recipe.parent / "runs" / "pico")
    whole.execute()
    whole.report()
    made.clear()
    found = run(recipe, REMOVED)
    assert set(made) == {"cost", *(d for d in made if len(d) == 16)}, "only serving costs are measured side by side"
    table = {row["model"]: row["metrics"] for row in read_table(whole.folder / "table.json")}
    for name, figure in found.content["baseline"]["metrics"].items():
        if name not in TIMED:
            assert figure == table["merged"][name]
    page = (whole.folder / "report.html").read_text()
    assert "No merging" in page, "the page of a finished run is written again"
    for name, text in (("old", "{}"), ("foreign", '{"plan": 1, "recipe": 2, "ablations": [3]}'), ("broken", "{")):
        (whole.folder / "ablations" / name).mkdir()
        (whole.folder / "ablations" / name / "ablation.json").write_text(text)
    whole.report()
    assert "No merging" in (whole.folder / "report.html").read_text()
    assert all(f"{name}/ablation.json" in caplog.text for name in ("old", "foreign", "broken"))


# what it says


@pytest.fixture(scope="module")
def recipe_of_module(pico_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {**copy.deepcopy(make_pico_values(pico_pipeline)), "seeds": [0, 1]}
    values["merge"]["search"] = "none"
    return written(values, tmp_path_factory.mktemp("ablate"))


PLAN = (
    REMOVED,
    arms(
        "Steps",
        fewer={"evaluate.samplers": [{"num_inference_steps": 1}, {"name": "DDPMScheduler", "num_inference_steps": 3}]},
        longer=LONGER,
        wrong={"decouple.num_ranges": 40},
    ),
)


@pytest.fixture(scope="module")
def found(recipe_of_module: Path) -> Findings:
    return run(recipe_of_module, *PLAN)


def test_record_holds_baseline_base_and_every_arm(found: Findings) -> None:
    content = json.loads((found.folder / "ablation.json").read_text())
    assert content == json.loads(json.dumps(found.content))
    assert (content["seeds"], content["outcome"], content["recipe"]) == ([0, 1], "merged", "pico")
    assert statuses(found) == {"removed": "done", "fewer": "done", "longer": "done", "wrong": "not_executable"}
    removed, merged = arm(found, "removed"), content["baseline"]
    assert (removed["model"], merged["model"]) == ("ensemble", "merged")
    assert removed["metrics"].keys() == merged["metrics"].keys() == content["base"]["metrics"].keys()
    assert len(removed["metrics"]["loss"]["values"]) == 2, "a value a seed, to be paired"
    assert removed["metrics"]["parameters"]["mean"] == 2 * merged["metrics"]["parameters"]["mean"]
    assert (removed["steps"], arm(found, "longer")["steps"], arm(found, "wrong")["steps"]) == (8, 12, 0)
    assert content["steps"] == {"shared": 20, "independent": 36}
    assert len(found.sentences) == 2


def test_columns_of_another_sampler_stand_under_the_baselines(found: Findings) -> None:
    name = next(name for name in found.content["baseline"]["metrics"] if name.startswith("FD") and "DDIM-2" in name)
    fewer, baseline = arm(found, "fewer")["metrics"][name], found.content["baseline"]["metrics"][name]
    assert (fewer["protocol"]["steps"], baseline["protocol"]["steps"]) == (1, 2)


def test_folder_holds_plan_recipes_links_and_the_report(found: Findings, recipe_of_module: Path) -> None:
    for name in ("plan.yaml", "recipe.yaml", "run.json", "ablation.md", "ablation.csv", "report.html"):
        assert (found.folder / name).is_file(), name
    folder = found.folder / arm(found, "longer")["folder"]
    assert (folder / "merged-seed0" / "model_index.json").is_file()
    assert (found.folder / arm(found, "removed")["folder"] / "experts-seed1" / "1" / "unet").is_dir()
    there = load(str(folder / "recipe.yaml")).recipe
    assert (there.decouple.total_steps, there.evaluate.controls) == (6, ())


def test_an_arm_is_a_recipe_that_runs_from_what_the_experiment_made(found: Findings) -> None:
    alone = open_run(load(str(found.folder / arm(found, "longer")["folder"])))
    states = Counter((node.stage, alone.store.status(node.key)) for node in alone.graph.nodes)
    assert states["decouple", "done"] == 4 and ("decouple", "missing") not in states


def test_clean_keeps_what_experiments_refer_to(found: Findings, recipe_of_module: Path) -> None:
    runs = recipe_of_module.parent / "runs"
    named = {(e["stage"], e["digest"]) for e in json.loads((found.folder / "run.json").read_text())["stages"]}
    assert named <= referenced(runs)
    assert not clean(Store(runs / "store"), referenced(runs), dry_run=True)
    arms_only = named - {(n.stage, n.digest) for n in open_run(load(str(runs / "pico"))).graph.nodes}
    assert {stage for stage, _ in arms_only} >= {"decouple", "evaluate"}
    record = (found.folder / "run.json").read_text()
    (found.folder / "run.json").write_text("broken")
    with pytest.raises(UserError, match="unknown"):
        referenced(runs)
    (found.folder / "run.json").write_text(record)


def test_two_processes_give_the_same_figures(found: Findings, recipe_of_module: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe_of_module.read_text())
    values["runtime"]["jobs"] = 2
    again = run(written(values, tmp_path), arms(longer=LONGER))

    def figures(findings: Findings) -> Any:
        models = (findings.content["baseline"], arm(findings, "longer"))
        return [{k: v for k, v in model["metrics"].items() if k not in TIMED} for model in models]

    assert figures(again) == figures(found)


def test_running_again_makes_nothing(found: Findings, recipe_of_module: Path, made: Counter[str]) -> None:
    again = run(recipe_of_module, *PLAN)
    assert not made
    assert again.content["seconds"] == found.content["seconds"]


# failing


def failing(monkeypatch: pytest.MonkeyPatch, steps: int, error: BaseException, calls: list[str]) -> None:
    """Trainings of so many steps raise an error; all are noted."""
    train = stages_module.Stages._decouple

    def called(self: Any, node: Node, folder: Path) -> Any:
        calls.append(node.label)
        if node.steps == steps:
            raise error
        return train(self, node, folder)

    monkeypatch.setattr(stages_module.Stages, "_decouple", called)


def test_a_failing_arm_stops_no_other_and_alone_runs_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    ablations = (arms(longer=LONGER, shorter={"decouple.total_steps": 2}), REMOVED)
    with monkeypatch.context() as patch:
        failing(patch, 3, MachineError("no memory\nleft"), calls)
        first = run(recipe, *ablations)
    assert statuses(first) == {"longer": "failed", "shorter": "done", "removed": "done"}
    assert len(calls) == 5, "the other expert of the arm that failed is not trained"
    assert (arm(first, "longer")["steps"], first.content["steps"]) == (0, {"shared": 6, "independent": 10})
    assert arm(first, "longer")["error"] == "no memory left"
    assert first.failed == ["Arms: longer: no memory left"]
    assert "no memory left" in (first.folder / "ablation.md").read_text()
    calls.clear()
    with monkeypatch.context() as patch:
        failing(patch, 0, MachineError("never"), calls)
        second = run(recipe, *ablations)
    assert len(calls) == 2, "both experts of the arm that failed"
    assert set(statuses(second).values()) == {"done"} and not second.failed


def test_a_training_that_diverges_is_a_failed_arm(recipe: Path) -> None:
    found = run(recipe, arms(wild={"decouple.learning_rate": 1e30}), REMOVED)
    assert statuses(found) == {"wild": "failed", "removed": "done"}
    assert arm(found, "wild")["error"]


def test_a_look_ahead_that_finds_an_arm_wrong_refuses_that_arm_alone(recipe: Path, made: Counter[str]) -> None:
    found = run(recipe, arms(nothing={"merge.keep": {"no_such_layer.*": "base"}}), REMOVED)
    assert statuses(found) == {"nothing": "failed", "removed": "done"}
    assert "no_such_layer" in arm(found, "nothing")["error"]


def test_without_a_baseline_there_is_nothing_to_compare(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Any, node: Node, folder: Path) -> Any:
        raise MachineError("gone")

    failing(monkeypatch, 3, MachineError("no memory left"), [])
    monkeypatch.setattr(stages_module.Stages, "_cost", gone)
    with pytest.raises(MachineError, match="gone"):
        run(recipe, arms(longer=LONGER, shorter={"decouple.total_steps": 2}))
    there = record(recipe.parent / "runs/pico/ablations/plan")
    assert (there["baseline"]["status"], there["baseline"]["error"]) == ("failed", "gone")
    longer, shorter = there["ablations"][0]["arms"]
    assert (longer["status"], longer["error"], shorter["status"]) == ("failed", "no memory left", "missing")


def test_a_record_that_tells_of_more_outlives_an_interruption(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(recipe, arms(longer=LONGER))
    shutil.rmtree(recipe.parent / "runs" / "store")
    failing(monkeypatch, 3, Interrupted("checkpoint written"), [])
    with pytest.raises(Interrupted):
        run(recipe, arms(longer=LONGER))
    assert record(first.folder) == json.loads(json.dumps(first.content))


def test_the_folder_of_another_recipe_gets_no_record(recipe: Path, pico_values: Values) -> None:
    folder = recipe.parent / "runs" / "pico"
    open_run(load(str(recipe)), out=folder).execute(lambda graph: graph.experts[0])
    other = written({**pico_values, "decouple": {**pico_values["decouple"], "total_steps": 8}}, recipe.parent / "other")
    with pytest.raises(UserError, match="another recipe"):
        run_plan(Plan("", [REMOVED]), other, out=folder)
    assert not (folder / "ablations").exists()


def test_an_interrupted_experiment_goes_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    ablations = (arms(longer=LONGER, shorter={"decouple.total_steps": 2}),)
    with monkeypatch.context() as patch:
        failing(patch, 3, Interrupted("checkpoint written"), calls)
        with pytest.raises(Interrupted):
            run(recipe, *ablations)
    folder = recipe.parent / "runs/pico/ablations/plan"
    there = record(folder)
    assert (there["baseline"]["status"], there["baseline"]["metrics"]) == ("missing", {}), "serving costs come last"
    assert [arm["status"] for arm in there["ablations"][0]["arms"]] == ["missing", "missing"]
    assert "baseline: missing; arms: 2 missing" in caplog.text
    assert [verdict.sentence for verdict in verdicts(there)] == ['Replacing "training" has not been run yet.']
    check_record(there)
    calls.clear()
    failing(monkeypatch, 0, MachineError("never"), calls)
    assert set(statuses(run(recipe, *ablations)).values()) == {"done"}
    assert len(calls) == 4, "the baseline's experts were done"


def test_what_ran_when_a_process_died_runs_alone(pico_recipe: Recipe) -> None:
    graph = open_run(Loaded(pico_recipe, {}), out=Path("nowhere")).graph
    experts = graph.experts[0]
    queue = Queue({node.digest: Task(graph, node) for node in experts})
    for i, task in enumerate(queue.ready(2)):
        queue.running[i] = task  # type: ignore[index]
        del queue.missing[task.node.digest]
    assert not queue.put_back(), "either of two may be the cause"
    (alone,) = queue.ready(2)
    queue.running[0] = alone  # type: ignore[index]
    del queue.missing[alone.node.digest]
    assert not queue.ready(2), "nothing is beside it"
    assert queue.put_back(), "now it is known"


# a division that has to be computed first


def test_divisions_by_gradients_are_compared_first(recipe: Path, made: Counter[str]) -> None:
    similar = {"decouple.division": "gradient_similarity", "similarity.bins": 4}
    there = opened(recipe, arms(similar=similar), REMOVED)
    assert there.cases[1].graph.provisional
    found = carried_out(there)
    assert statuses(found) == {"similar": "done", "removed": "done"}
    assert made["similarity"] == 1
    assert not there.cases[1].graph.provisional
    assert arm(found, "similar")["reason"] == "", "nothing waits any more"
    runs = recipe.parent / "runs"
    assert not clean(Store(runs / "store"), referenced(runs), dry_run=True), "the similarity is kept as well"


def test_what_was_asked_for_beside_a_recipes_stages_stays_named(recipe: Path) -> None:
    there = open_run(load(str(recipe)), out=recipe.parent / "runs" / "pico")
    there.prepare()
    asked = there.graph.compared()
    there.finished(asked, Artefact(there.folder, {"digest": asked.digest, "seconds": 1.0}), False)
    again = open_run(load(str(recipe)), out=there.folder)
    again.prepare()
    assert ("similarity", asked.digest) in referenced(recipe.parent / "runs")


def test_what_the_baseline_needs_and_fails_before_the_comparison_ends_it(
    pico_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = {"sample_size": 8, "block_out_channels": [4, 8], "norm_num_groups": 2}
    pretrain = {"total_steps": 1, "train_batch_size": 4, "unet": unet, "scheduler": {"num_train_timesteps": 20}}
    pico_values |= {"model": {}, "pretrain": pretrain}
    failing_once(monkeypatch, "_pretrain")
    with pytest.raises(MachineError, match="once"):
        similar = {"decouple.division": "gradient_similarity", "similarity.bins": 4}
        run(written(pico_values, tmp_path), arms(similar=similar))


def test_what_failed_is_tried_again_in_the_engines_next_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = opened(recipe, arms(longer=LONGER))
    there.run.prepare()
    failing_once(monkeypatch, "_decouple")
    baseline, longer = there.cases
    needed = [node for node in baseline.needed if not node.exclusive]
    with Engine(there.run.store, there.run.recipe.runtime, lambda *_: None) as engine:
        engine.run([(longer.graph, []), (baseline.graph, needed)])
        assert str(engine.error_of(baseline.graph, needed)) == "once"
        engine.run([(longer.graph, []), (baseline.graph, needed)])
        assert engine.error_of(baseline.graph, needed) is None
    assert all(there.run.store.status(node.key) == "done" for node in needed)


def failing_once(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """The first stage of a kind fails."""
    train, calls = getattr(stages_module.Stages, stage), list[str]()

    def called(self: Any, node: Node, folder: Path) -> Any:
        calls.append(node.label)
        if len(calls) == 1:
            raise MachineError("once")
        return train(self, node, folder)

    monkeypatch.setattr(stages_module.Stages, stage, called)


# opening


def test_another_plan_of_the_same_name_has_a_folder_of_its_own(recipe: Path) -> None:
    def folder(plan: Plan | Path) -> str:
        there = opened_plan(plan, str(recipe), [], out=recipe.parent / "runs" / "pico")
        there.run.prepare()
        begin(there)
        return there.folder.name

    more = Plan("why", [REMOVED, arms(longer=LONGER)])
    assert folder(Plan("why", [REMOVED])) == "plan"
    assert folder(more).startswith("plan-") and folder(more) == folder(more)
    assert folder(Plan("otherwise told", [REMOVED])) == "plan", "the same ablations"
    source = recipe.parent / "plan.yaml"
    source.write_text(to_yaml(more))
    assert folder(source) == folder(more)
    source.rename(recipe.parent / "Store.yaml")
    assert folder(recipe.parent / "Store.yaml") == "store-2", "the store's name is taken"


def test_no_arm_is_called_as_the_store(recipe: Path) -> None:
    there = opened(recipe, Ablation("", "", "REPLACE", ["store", "."], changes={"store": LONGER, ".": {}}))
    assert "store" not in {trial.slug for trial in there.trials}
    taken: set[str] = set()
    names = [unused(text, taken) for text in ("store", ".", "..", "", "STORE")]
    assert len(set(names)) == 5 and not {"store", ".", "..", ""} & set(names)


def test_exact_changes_of_several_parts_are_of_none(recipe: Path) -> None:
    merging, longer = {"merge.method": "ties"}, LONGER
    assert opened(recipe, arms(a=longer, b={"decouple.total_steps": 8})).parts[0].resolved.part == "training length"
    assert opened(recipe, arms(a=longer, b=merging)).parts[0].resolved.part is None


def test_an_arm_whose_base_cannot_be_fetched_failed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    elsewhere = {"model.pretrained": "nobody/nothing"}
    there = opened(recipe, arms(elsewhere=elsewhere), REMOVED)
    check(there)
    (arm,) = content(there)["ablations"][0]["arms"]
    assert arm["status"] == "failed" and "no network" in arm["error"]
    with pytest.raises(MachineError, match="no network"):
        check(opened(recipe, arms(elsewhere=elsewhere)))


def test_samplers_that_the_baseline_has_keep_their_names() -> None:
    assert _labels(["DDPM-3", "DDIM-2"], ["DDIM-2", "DDPM-3"]) == {}
    assert _labels(["DDPM-3", "DDIM-9"], ["DDIM-2", "DDPM-3"]) == {"DDIM-9": "DDIM-2"}
    assert _labels(["DDIM-9", "DDIM-8"], ["DDIM-2"]) == {"DDIM-9": "DDIM-2"}


def test_a_plan_without_ablations_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match="no ablation"):
        opened(recipe)


def test_a_launch_of_several_processes_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deme_diffusion.processes.count", lambda: 2)
    with pytest.raises(UserError, match="launch"):
        opened(recipe, REMOVED)


def test_a_folder_with_another_recipes_results_is_refused(found: Findings, recipe_of_module: Path) -> None:
    values = yaml.safe_load(recipe_of_module.read_text())
    values["decouple"]["total_steps"] = 8
    other = written(values, recipe_of_module.parent / "other")
    with pytest.raises(UserError, match="another recipe"):
        run_plan(Plan("", [REMOVED]), other, out=recipe_of_module.parent / "runs" / "pico")


def test_names_of_arms_never_collide(recipe: Path) -> None:
    texts = ["a b", "a-b", "A B", "é" * 100, "é" * 101]
    many = Ablation("Many", "x", "REPLACE", texts, changes={t: {"decouple.total_steps": 6 + i} for i, t in
                                                            enumerate(texts)})  # fmt: skip
    there = opened(recipe, many, many)
    slugs = [trial.slug for trial in there.trials]
    assert len(set(slugs)) == 10 and all(len(slug) < 90 and "/" not in slug for slug in slugs)
    assert len(there.cases) == 6, "arms of equal change are one case"
    assert planned(there)["steps"]["independent"] == 4 + 2 * (6 + 7 + 8 + 9 + 10)


def test_failures_are_logged_in_a_line(recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    failing(monkeypatch, 3, MachineError("no memory left"), [])
    with caplog.at_level(logging.INFO):
        run(recipe, arms(longer=LONGER))
    assert "pico-arms.longer: expert 0 [0,10) failed: no memory left" in caplog.text
    told = [line for line in caplog.messages if "features of" in line or "sample " in line]
    assert not told, "of stages that take no time there is no line"
    assert sum("pico: expert" in line and "done in" in line for line in caplog.messages) == 2, "of trainings there is"
