"""What would stop a run only after its trainings is found before the first: once, and only where something trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_pico_values, pico_pretrain, save_classifier
from deme_diffusion.config import DataSettings, Recipe
from deme_diffusion.decoupling.setup import on_cpu
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.models.devices import device_of
from deme_diffusion.pipeline import preflight
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.recipes import Loaded, load
from deme_diffusion.recipes.checks import parse
from pictures import caches_in, noise, write_parquet

Values = dict[str, Any]


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches_in(tmp_path / "caches", monkeypatch)


def run_of(values: Values, folder: Path) -> Run:
    return open_run(Loaded(parse(values, where="pico"), {}), out=folder / "runs" / "pico")


def on_table(values: Values, folder: Path, *, labels: list[int | None], channels: int = 1, **extractor: Any) -> Values:
    """The pico recipe on eighty images in a parquet file, of which each may have a label."""
    images = noise(0, len(labels), channels=channels)
    file = write_parquet(folder / "images.parquet", images, column="image", label=labels)
    data = {"source": "parquet", "path": str(file), "mode": "L" if channels == 1 else "RGB"}
    return {**values, "data": data, "extractor": extractor}


def from_scratch(values: Values) -> Values:
    """The pico recipe with a base of its own to train first."""
    return {**values, "model": {}, "pretrain": {**pico_pretrain().model_dump(mode="json"), "total_steps": 2}}


def made(run: Run) -> set[str]:
    """The stages of a run that are done."""
    return {node.stage for node in run.graph.nodes if run.store.find(node.key)}


# which extractor a recipe has


def test_the_packaged_classifier_is_for_the_digits_alone(pico_values: Values, tmp_path: Path) -> None:
    assert Recipe().extractor.pretrained == "packaged:digits-cnn"
    assert Recipe(data=DataSettings(views=2)).extractor.pretrained == "packaged:digits-cnn"
    assert Recipe(data=DataSettings(source="folder", path=str(tmp_path))).extractor.pretrained is None
    silent = [f"data.path={tmp_path}", "data.source=folder"]
    assert load("digits", silent).recipe.extractor.pretrained is None
    for extractor in ({}, {"kind": "classifier"}, {"features": 8}):
        recipe = parse({**pico_values, "extractor": extractor}, where="pico")
        assert recipe.extractor.pretrained == "packaged:digits-cnn"
        recipe = parse(on_table(pico_values, tmp_path, labels=[0, 1] * 40, **extractor), where="pico")
        assert recipe.extractor.pretrained is None
        graph = Graph(recipe)
        assert graph.extractor_name == "parquet-cnn" and len(list(graph.of_stage("extractor"))) == 1
    recipe = parse({**pico_values, "extractor": {"kind": "inception"}}, where="pico")
    assert recipe.extractor.pretrained is None
    assert parse({**pico_values, "extractor": {"pretrained": None}}, where="pico").extractor.pretrained is None
    with pytest.raises(
        UserError, match=r"^pico: extractor\.pretrained: packaged:digits-cnn is for the digits, not for"
    ):
        parse(on_table(pico_values, tmp_path, labels=[0], pretrained="packaged:digits-cnn"), where="pico")


@pytest.mark.parametrize("name", ["digits", "digits-full"])
def test_recipes_on_the_digits_mean_what_they_meant(name: str) -> None:
    silent, named = load(name).recipe, load(name, ["extractor.pretrained=packaged:digits-cnn"]).recipe
    assert silent == named
    assert [node.digest for node in Graph(silent).nodes] == [node.digest for node in Graph(named).nodes]
    trained = Graph(load(name, ["extractor.pretrained=null"]).recipe)
    (extractor,) = trained.of_stage("extractor")
    assert "pretrained" not in extractor.key.settings


# the extractor and the labels


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_extractor_that_does_not_take_the_images_is_refused_first(
    pico_values: Values, tmp_path: Path, jobs: int
) -> None:
    grey = save_classifier(tmp_path / "grey", channels=1)
    values = from_scratch(on_table(pico_values, tmp_path, labels=[0] * 80, channels=3, pretrained=str(grey)))
    values["pretrain"]["unet"]["in_channels"] = 3
    values["runtime"] = {**values["runtime"], "jobs": jobs}
    run = run_of(values, tmp_path)
    with pytest.raises(UserError, match=r"^extractor: it takes images of 1 channels, these have 3; use data\.mode=L"):
        run.execute()
    assert made(run) == {"data"}
    if jobs == 1:
        run.execute(run.graph.experts[0])  # which need no extractor
        assert made(run) == {"data", "pretrain", "decouple"}


@pytest.mark.parametrize(
    ("lacking", "said"), [(3, "3 of 80 images have no label, and"), (80, "the images have no labels")]
)
def test_labels_that_a_classifier_would_lack_are_counted_first(
    pico_values: Values, tmp_path: Path, lacking: int, said: str
) -> None:
    labels = [None] * lacking + [i % 2 for i in range(80 - lacking)]
    run = run_of(from_scratch(on_table(pico_values, tmp_path, labels=labels, total_steps=1)), tmp_path)
    with pytest.raises(UserError, match=rf"^data: .*images\.parquet: {said}"):
        run.execute()
    assert made(run) == {"data"}


def test_a_classifier_for_larger_images_is_refused_first(pico_values: Values, tmp_path: Path) -> None:
    run = run_of(from_scratch(on_table(pico_values, tmp_path, labels=[0, 1] * 40, stages=3)), tmp_path)
    with pytest.raises(UserError, match=r"^extractor\.stages=3 needs images of 16 pixels or more, these are 8x8"):
        run.execute()
    assert made(run) == {"data"}


def test_a_network_that_fails_on_a_shape_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_classifier(tmp_path / "grey", channels=1)
    pixels = noise(0, 1, channels=1)[0][None]
    assert preflight.try_extractor(folder, "classifier", pixels).dimension == 8

    def fail(*_: object) -> None:
        raise RuntimeError("Given groups=1,\nexpected input")

    monkeypatch.setattr(torch.nn.Conv2d, "forward", fail)
    with pytest.raises(UserError) as told:
        preflight.try_extractor(folder, "classifier", pixels)
    assert str(told.value) == f"extractor: {folder} cannot take images of 8x8 with 1 channels (Given groups=1,)"


# settings that this machine cannot follow


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_refused_and_never_replaced(pico_values: Values, tmp_path: Path) -> None:
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    for ask in (device_of, on_cpu):
        with pytest.raises(UserError, match=r"^runtime\.device: cuda, but torch .* sees no GPU; use auto or cpu$"):
            ask("cuda")
    run = run_of({**pico_values, "runtime": {"device": "cuda"}}, tmp_path)
    with pytest.raises(UserError, match=r"^runtime\.device: cuda"):
        run.execute(list(run.graph.experts[0]))
    assert not made(run)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        (
            "decouple",
            {"mixed_precision": "fp16"},
            "decouple.mixed_precision: fp16 needs a GPU, and this runs on the cpu",
        ),
        ("decouple", {"use_8bit_adam": True}, "decouple.use_8bit_adam: needs "),
        ("pretrain", {"use_8bit_adam": True}, "pretrain.use_8bit_adam: needs "),
    ],
)
def test_what_experts_cannot_have_here_is_refused_before_the_base_is_trained(
    pico_values: Values, tmp_path: Path, section: str, change: Values, said: str
) -> None:
    values = from_scratch(pico_values)
    run = run_of({**values, section: {**values[section], **change}}, tmp_path)
    with pytest.raises(UserError) as told:
        run.execute()
    assert str(told.value).startswith(said)
    assert not made(run)
    if section == "decouple":  # the base alone is not trained by it
        run.execute(list(run.graph.of_stage("pretrain")))
        assert made(run) == {"pretrain"}


def test_half_precision_is_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse({"decouple": {"mixed_precision": "bf16"}, "runtime": {"device": "cuda"}}, where="pico")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able: able)
        found = [key for key, _ in preflight.settings_problems(recipe, ["decouple"])]
        assert found == ([] if able else ["decouple.mixed_precision"])


def test_no_compiler_is_told_before_the_first_training(
    pico_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of({**pico_values, "runtime": {"device": "cpu", "compile": True}}, tmp_path)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(MachineError, match=r"^runtime\.compile on a CPU needs a C\+\+ compiler"):
        run.execute()
    assert not made(run)


# when it looks


def test_it_looks_once_where_something_trains_and_never_again(
    pico_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[list[str]] = []
    check = preflight.check

    def noted(bench: Any, nodes: Any) -> None:
        looked.append([node.stage for node in nodes])
        check(bench, nodes)

    monkeypatch.setattr(preflight, "check", noted)
    run = run_of(make_pico_values(pico_pipeline), tmp_path)
    run.execute(list(run.graph.experts[0]))
    assert looked == [["decouple", "decouple"]]
    run.execute(list(run.graph.experts[0]))
    run.execute([run.graph.samples["base", 0]])  # trains nothing
    assert len(looked) == 1
