"""How a recipe's images enter the graph: digests, the index as a stage, the model's shape, and a run on a folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import make_pico_values
from deme_diffusion.data.index import SUMMARY
from deme_diffusion.data.table import Table
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.images import check_fit, source_of
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.recipes import Loaded
from deme_diffusion.recipes.checks import parse
from deme_diffusion.weight_files import read_json
from pictures import caches_in, noise, numbered, on, write_folder, write_parquet

Values = dict[str, Any]
UNET = {"sample_size": 8, "in_channels": 3, "block_out_channels": [4, 8], "norm_num_groups": 2}


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches_in(tmp_path / "caches", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Enough colour images of 12x10 for three splits, in two classes."""
    images = noise(0, 120, height=12, width=10)
    return write_folder(tmp_path / "d", {f"{i % 2}/{i:03}.png": image for i, image in enumerate(images)})


def on_images(path: Path | str, source: str = "folder", **data: Any) -> Values:
    """A pico recipe that trains its base and its extractor on images of 8x8 in colour."""
    values = make_pico_values("nothing")
    values["model"] = {"pretrained": None}
    scheduler = {"num_train_timesteps": 20, "beta_end": 0.3}
    values["pretrain"] = {"total_steps": 2, "train_batch_size": 4, "unet": UNET, "scheduler": scheduler}
    values["extractor"] = {"pretrained": None, "total_steps": 2}
    values["data"] = {"source": source, "path": str(path), "resolution": 8, **data}
    return values


def graph_of(values: Values) -> Graph:
    return Graph(parse(values, where="test"))


def digests(graph: Graph) -> dict[str, set[str]]:
    """Stage -> digests."""
    result: dict[str, set[str]] = {}
    for node in graph.nodes:
        result.setdefault(node.stage, set()).add(node.digest)
    return result


def opened(values: Values, out: Path) -> Run:
    return open_run(Loaded(parse(values, where="test"), {}), out=out, command="deme run pico")


# --- digests ------------------------------------------------------------------------------------------------------


def test_images_are_indexed_by_a_stage_that_all_others_look_through(folder: Path) -> None:
    graph = graph_of(on_images(folder))
    assert isinstance(graph.data, Node)
    assert graph.nodes[0] is graph.data
    assert graph.data.stage == "data"
    assert all(node.parents["data"] is graph.data for node in graph.nodes if "data" in node.parents)


def test_defaults_spelled_out_change_no_digest(folder: Path) -> None:
    spelled = on_images(folder, mode="RGB", crop="center", interpolation="lanczos", max_corrupt=0.01, split="train")
    assert digests(graph_of(spelled)) == digests(graph_of(on_images(folder)))


def test_the_place_of_the_images_changes_no_digest_and_their_content_does(folder: Path, tmp_path: Path) -> None:
    before = digests(graph_of(on_images(folder)))
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert digests(graph_of(on_images(tmp_path / "elsewhere"))) == before
    write_folder(tmp_path / "elsewhere", {"0/000.png": noise(9, 1)[0]})
    assert not before["data"] & digests(graph_of(on_images(tmp_path / "elsewhere")))["data"]


@pytest.mark.parametrize("change", [{"augment": {"flip": 0.5}}, {"views": 2}])
def test_augmentation_changes_what_is_trained_and_not_the_index(folder: Path, change: Values) -> None:
    before, after = digests(graph_of(on_images(folder))), digests(graph_of(on_images(folder, **change)))
    assert before["data"] == after["data"]
    for stage in ("pretrain", "extractor", "decouple", "features", "evaluate"):
        assert not before[stage] & after[stage], stage


@pytest.mark.parametrize("change", [{"resolution": 4}, {"mode": "L"}, {"crop": "random"}, {"report_fraction": 0.3}])
def test_what_shapes_the_pixels_or_the_splits_changes_the_index(folder: Path, change: Values) -> None:
    before, after = digests(graph_of(on_images(folder))), digests(graph_of(on_images(folder, **change)))
    assert not before["data"] & after["data"]


# --- the hub, without a network -----------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached."""

    def refuse(*args: Any, **options: Any) -> None:
        raise ConnectionError("the hub is\nout of reach")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)


@pytest.mark.usefixtures("offline")
def test_a_hub_data_set_that_is_neither_here_nor_reachable_is_refused_in_one_line() -> None:
    with pytest.raises(
        UserError, match=r"data\.path: owner/name could not be reached on the hub \(the hub is\)"
    ) as refused:
        source_of(on("hub", "owner/name"), download=True)
    assert "\n" not in str(refused.value)
    assert source_of(on("hub", "owner/name"), download=False).commit == "main"  # a dry run asks nobody


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("download", [False, True])
def test_what_the_cache_knows_of_a_hub_data_set_is_used(tmp_path: Path, download: bool) -> None:
    reference = tmp_path / "caches" / "hub" / "datasets--owner--name" / "refs" / "main"
    write_folder(reference.parent, {"main": b"c" * 40})
    source = source_of(on("hub", "owner/name"), download=download)
    assert source.commit == "c" * 40
    assert source_of(on("hub", "owner/name", revision="c" * 40), download=download).digest == source.digest
    assert source_of(on("hub", "owner/name", revision="d" * 40), download=download).digest != source.digest


def test_the_commit_of_a_hub_data_set_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        sha = "e" * 40

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, revision: Info)
    assert source_of(on("hub", "owner/name"), download=True).commit == "e" * 40


@pytest.mark.parametrize("name", ["name", "./owner/name", "a/b/c"])
def test_what_is_no_hub_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.path: .* is no hub name \(owner/name\)"):
        source_of(on("hub", name), download=False)


# --- the shape that the model takes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "model", "remedy"),
    [
        ((3, 12, 10), (3, 8, 8), "12 with 3 channels, the model takes 8x8 with 3 channels; set data.resolution=8"),
        ((3, 8, 8), (1, 8, 8), "set data.mode=L"),
        ((1, 8, 8), (3, 8, 8), "set data.mode=RGB"),
        ((3, 8, 8), (4, 8, 8), "no data.mode has so many channels"),
        ((3, 8, 8), (3, 8, 12), "data.resolution makes squares only"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_the_value_that_does(
    shape: tuple[int, ...], model: tuple[int, ...], remedy: str
) -> None:
    settings = on("folder", "anywhere")
    with pytest.raises(UserError) as refused:
        check_fit(shape, model, settings)
    assert str(refused.value).endswith(remedy)
    check_fit(model, model, settings)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [({"resolution": 4}, r"set data\.resolution=8"), ({"mode": "L"}, r"set data\.mode=RGB")],
)
def test_nothing_is_trained_on_images_that_do_not_fit(
    folder: Path, tmp_path: Path, change: Values, remedy: str
) -> None:
    run = opened(on_images(folder, **change), tmp_path / "run")
    with pytest.raises(UserError, match=remedy):
        run.execute()
    done = [node.stage for node in run.graph.nodes if run.store.find(node.key)]
    assert done == ["data"]


def test_a_pretrained_base_is_compared_too(folder: Path, tmp_path: Path, pico_pipeline: Path) -> None:
    values = {**on_images(folder), "model": {"pretrained": str(pico_pipeline)}}
    run = opened(values, tmp_path / "run")
    run.execute([run.graph.nodes[0]])
    with pytest.raises(UserError, match=r"the model takes 8x8 with 1 channels; set data\.mode=L"):
        _ = Stages(run.graph, run.store).splits


# --- a run --------------------------------------------------------------------------------------------------------


def test_a_run_on_a_folder_of_images_and_its_resumption_at_no_cost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = on_images(folder, crop="random", augment={"flip": 0.5}, max_corrupt=0.02)
    write_folder(folder, {"1/zzz.png": b"no image"})
    run = opened(values, tmp_path / "run")
    run.execute()
    run.report()
    assert isinstance(run.graph.data, Node)
    summary = read_json(run.store.folder(run.graph.data.key) / SUMMARY)
    assert (summary["images"], summary["unreadable"]) == (121, 1)
    assert summary["sizes"] == {"10x12": 120}
    pixels = np.load(run.store.folder(next(run.graph.of_stage("sample")).key) / "images.npy")
    assert pixels.shape[1:] == (8, 8, 3)

    def refuse(*args: Any) -> None:
        raise AssertionError("nothing is left to be done")

    monkeypatch.setattr(Stages, "make", refuse)
    monkeypatch.setattr(Table, "__init__", refuse)
    opened(values, tmp_path / "run").execute()
    shutil.move(folder, tmp_path / "moved")
    values["data"]["path"] = str(tmp_path / "moved")
    opened(values, tmp_path / "other").execute()


def test_a_base_trained_here_is_not_taken_for_one_that_saw_other_images(folder: Path, tmp_path: Path) -> None:
    run = opened(on_images(folder), tmp_path / "run")
    assert isinstance(run.graph.base, Node)
    run.execute([run.graph.base])
    base = run.store.folder(run.graph.base.key)
    more = {**on_images(folder, report_fraction=0.3), "model": {"pretrained": str(base)}}
    with pytest.raises(UserError, match=r"model\.pretrained: .*was trained on all but 0\.4 of .*lower them"):
        graph_of(more)
    others = write_folder(tmp_path / "e", numbered(noise(7, 40)))
    on_others = {**on_images(others, report_fraction=0.3), "model": {"pretrained": str(base)}}
    assert isinstance(graph_of(on_others).base, Input)


# --- the published data set ---------------------------------------------------------------------------------------


@pytest.mark.skipif("DEME_TEST_DATA" not in os.environ, reason="DEME_TEST_DATA names no folder with cifar10/*.parquet")
def test_cifar10_in_its_published_layout(tmp_path: Path) -> None:
    cifar = Path(os.environ["DEME_TEST_DATA"]) / "cifar10"
    values = on_images(cifar, "parquet", max_images=3000, resolution=None, label_column="label")
    values["pretrain"]["unet"] = {**UNET, "sample_size": 32}
    run = opened(values, tmp_path / "run")
    run.execute([run.graph.nodes[0]])
    splits = Stages(run.graph, run.store).splits
    assert splits["train"].shape == (3, 32, 32)
    assert sum(map(len, splits.values())) == 3000
    assert set(splits["train"].labels(range(len(splits["train"]))).tolist()) == set(range(10))
    copy = write_parquet(tmp_path / "a.parquet", [splits["search"].source.pixels(i) for i in splits["search"].indices])
    again = opened({**values, "data": {"source": "parquet", "path": str(copy)}}, tmp_path / "again")
    with pytest.raises(UserError, match="the train split is empty"):  # the same pixels fall into the same split
        again.execute()
