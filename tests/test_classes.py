"""Labels of a data set as the classes of a class-conditional model, and as those of a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from deme_diffusion.data.classes import Classes, in_model
from deme_diffusion.data.splits import Split
from deme_diffusion.errors import UserError
from deme_diffusion.files import write_json
from deme_diffusion.pipeline.images import indexed
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import open_run
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.recipes import load, parse
from pictures import caches_in, noise, numbered, on, write_folder, write_parquet

NAMES = {"tench": 0, "one": 1, "two, deux": 2, "deux": 2}
KNOWN: dict[str, Any] = {"count": 4, "names": NAMES, "model": "dit", "data": "d"}


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of 1000 classes."""
    return tiny.dit(tmp_path_factory.mktemp("classes") / "dit")


def stages(dit: Path, data: dict[str, Any], folder: Path) -> Stages:
    """The stages of a recipe whose images are indexed."""
    samplers = [{"name": "DDIMScheduler", "num_inference_steps": steps, "guidance_scale": 1.0} for steps in (2, 3)]
    values = {
        "model": {"family": "dit", "pretrained": str(dit)},
        "data": data,
        "extractor": {"kind": "inception"},
        "merge": {"sampler": samplers[0]},
        "evaluate": {"samplers": samplers, "num_images": 8},
        "decouple": {"num_ranges": 2},
    }
    write_json(folder / "r.yaml", values)
    run = open_run(load(str(folder / "r.yaml"), []), out=folder / "run", command="", download=False)
    made, node = Stages(run.graph, run.store), run.graph.data
    assert isinstance(node, Node)
    run.store.folder(node.key).mkdir(parents=True)
    made._data(node, run.store.folder(node.key))
    return made


def asked(split: Split) -> set[int]:
    """Classes that a training tells the model."""
    keyed: dict[str, Any] = {"seed": 0, "purpose": "augment", "step": 0, "first": 0}
    found: set[int] = set(split.training_batch(range(len(split)), **keyed)["label"].tolist())
    return found


def test_numbers_are_the_models_classes_and_a_classifiers_have_no_gaps(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches_in(tmp_path, monkeypatch)
    labels = [(207, 281)[i % 2] for i in range(60)]
    file = write_parquet(tmp_path / "a.parquet", noise(0, 60, channels=1), label=labels)
    splits = stages(dit, {"source": "parquet", "path": str(file), "mode": "L"}, tmp_path).splits
    for split in splits.values():
        assert asked(split) == set(split.view_batch(0)["label"].tolist()) == {207, 281}
        assert set(split.labels(range(len(split))).tolist()) == {0, 1}
        for position in range(len(split)):
            number = int(split.prompts([position], 0)["label"])
            assert number == labels[split.indices[position]]
    keyed: dict[str, Any] = {"seed": 0, "purpose": "augment", "step": 0, "first": 0}
    assert splits["train"].training_batch([0, 1], **keyed, empty=1.0)["label"].tolist() == [-1, -1]


@pytest.mark.parametrize(("folders", "classes"), [(("one", "deux"), {1, 2}), (("10", "9"), {9, 10})])
def test_folders_are_classes_by_name(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: tuple[str, str], classes: set[int]
) -> None:
    caches_in(tmp_path, monkeypatch)
    images = numbered(noise(0, 60, channels=1))
    write_folder(tmp_path / "d", {f"{folders[i % 2]}/{name}": image for i, (name, image) in enumerate(images.items())})
    made = stages(dit, {"source": "folder", "path": str(tmp_path / "d"), "mode": "L"}, tmp_path)
    assert asked(made.splits["train"]) == classes


@pytest.mark.parametrize(
    ("labels", "message"),
    [([7, 1000], "label 1000, but .* knows classes 0 to 999"), (["one", "deuks"], r"named 'deuks'; did you mean")],
)
def test_labels_that_the_model_lacks_are_refused_in_a_line(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[Any], message: str
) -> None:
    caches_in(tmp_path, monkeypatch)
    file = write_parquet(tmp_path / "a.parquet", noise(0, 60, channels=1), label=[labels[i % 2] for i in range(60)])
    made = stages(dit, {"source": "parquet", "path": str(file), "mode": "L"}, tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        _ = made.splits
    assert "\n" not in str(refused.value)


def test_names_that_a_data_set_gives_its_numbers_come_first(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import ClassLabel, Dataset, Features, Image

    caches_in(tmp_path, monkeypatch)
    file = write_parquet(tmp_path / "a.parquet", noise(0, 60, channels=1), label=[i % 2 for i in range(60)])
    features = Features({"img": Image(), "label": ClassLabel(names=["two, deux", "one"])})
    Dataset.from_parquet(str(file)).cast(features).to_parquet(tmp_path / "b" / "b.parquet")
    made = stages(dit, {"source": "parquet", "path": str(tmp_path / "b"), "mode": "L"}, tmp_path)
    assert asked(made.splits["train"]) == {1, 2}
    assert made.splits["train"].classes.tolist() == [2, 1]


def test_as_many_names_as_the_model_has_classes_are_its_classes_in_order() -> None:
    found = Classes([0, 2, 3], ["n01", "n02", "n03", "n04"])
    assert in_model(found, **KNOWN).tolist() == [0, 2, 3]
    with pytest.raises(UserError, match=r"d: dit has no class named 'n01'.*number its labels 0 to 4"):
        in_model(found, **{**KNOWN, "count": 5})
    assert in_model(Classes([0, 1], ["deux ", "tench"]), **KNOWN).tolist() == [2, 0]
    assert in_model(Classes(()), **KNOWN).dtype == np.int64


def test_a_name_of_two_classes_is_none_of_them(tmp_path: Path) -> None:
    from deme_diffusion.models.families import family

    folder = tiny.dit(tmp_path / "dit")
    index = {"id2label": {"134": "crane", "517": "crane", "5": "ray, skate", "9": "skate"}}
    write_json(folder / "model_index.json", {**load_json(folder / "model_index.json"), **index})
    denoiser: Any = family("dit").load(folder)
    assert denoiser.class_names == {"ray, skate": 5, "ray": 5} and denoiser.num_classes == 1000


def load_json(file: Path) -> Any:
    """A JSON file."""
    import json

    return json.loads(file.read_text())


def test_only_a_class_conditional_model_changes_the_index(tmp_path: Path) -> None:
    data = on("parquet", tmp_path, label_column="x")
    assert indexed(data, "class") == {**indexed(data, "nothing"), "classes": True}
    assert indexed(data, "text") == {**indexed(data, "nothing"), "captions": True}


def test_an_sdxl_that_is_told_of_whole_images_takes_no_random_crop() -> None:
    values = {
        "model": {"family": "stable_diffusion_xl", "pretrained": "x"},
        "data": {"source": "folder", "path": "x", "crop": "random", "resolution": 8},
    }
    with pytest.raises(UserError, match=r"data\.crop=random: family stable_diffusion_xl .*set data\.crop=center"):
        parse(values, where="here")
