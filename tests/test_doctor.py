"""What the doctor finds: a broken environment, images that cannot be used, too little disk and memory."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import save_classifier
from deme_diffusion.cli import main
from deme_diffusion.config import Recipe
from deme_diffusion.doctor import Finding, environment, examine, needs
from deme_diffusion.pipeline.run import open_run
from deme_diffusion.recipes import Loaded
from deme_diffusion.recipes.checks import parse


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Forty grey 8x8 images of two classes, three of which cannot be read."""
    folder, draw = tmp_path / "pictures", np.random.Generator(np.random.Philox(0))
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for i in range(40):
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / "ab"[i // 20] / f"{i:02}.png")
    for name in ("a/05.png", "a/17.png", "b/30.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    return folder


def on_pictures(values: dict[str, Any], folder: Path, **data: object) -> Recipe:
    given = {"source": "folder", "path": str(folder), "mode": "L", "max_corrupt": 0.2, **data}
    return parse({**values, "data": given, "extractor": {"pretrained": None, "total_steps": 1}}, where="pico")


def examined(recipe: Recipe, out: Path) -> dict[str, Finding]:
    found = examine(lambda: open_run(Loaded(recipe, {}), out=out, download=False))
    return {finding.topic: finding for finding in found}


def test_the_environment_of_these_tests_is_well() -> None:
    found = list(examine(None))
    assert {"python", "torch", "diffusers", "torchvision", "cuda"} <= {finding.topic for finding in found}
    assert not [finding for finding in found if finding.status == "problem"]


def test_a_torchvision_for_another_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torchvision": "0.20.1", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(environment, "_version", versions.get)
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", "torch==2.5.1", 'scipy; extra == "scipy"'])
    finding = environment.torchvision()
    assert finding.status == "problem"
    assert finding.text.startswith("0.20.1 is for torch 2.5.1, not 2.13.0+cpu")


def test_a_torchvision_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(environment, "_version", {"torchvision": "0.28.0", "torch": "2.13.0"}.get)
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch==2.13.0"])
    monkeypatch.setattr(environment.importlib, "import_module", broken)
    finding = environment.torchvision()
    assert finding.status == "problem"
    assert "operator torchvision::nms does not exist)" in finding.text


def test_images_are_counted_and_the_unreadable_named(
    pico_values: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    found = examined(on_pictures(pico_values, pictures), tmp_path / "run")
    assert found["data"].text == f"40 images in {pictures}"
    assert found["unreadable"].status == "warning"
    assert found["unreadable"].text == "3 images (7.50%) would be skipped"
    assert [line.split(":")[1].strip() for line in found["unreadable"].details] == ["a/05.png", "a/17.png", "b/30.png"]
    assert found["sizes"].text == "8x8 (37)"
    assert found["modes"].text == "L (37)"
    assert found["model"].status == "ok"


def test_too_many_unreadable_images_are_a_problem(pico_values: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    found = examined(on_pictures(pico_values, pictures, max_corrupt=0.05), tmp_path / "run")
    assert found["data"].status == "problem"
    assert "3 of 40 images cannot be read" in found["data"].text
    assert len(found["data"].details) == 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"mode": "RGB"}, "with 3 channels, the model takes 8x8 with 1 channels; set data.mode=L"),
        ({"resolution": 16}, "16x16 with 1 channels, the model takes 8x8 with 1 channels; set data.resolution=8"),
    ],
)
def test_images_that_do_not_fit_the_model_are_a_problem(
    pico_values: dict[str, Any], pictures: Path, tmp_path: Path, data: dict[str, Any], said: str
) -> None:
    found = examined(on_pictures(pico_values, pictures, **data), tmp_path / "run")
    assert found["model"].status == "problem"
    assert found["model"].text.endswith(said)


def test_an_empty_split_is_a_problem(pico_values: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    found = examined(on_pictures(pico_values, pictures, search_fraction=0.0), tmp_path / "run")
    assert found["splits"].status == "problem"
    assert "the search split holds 0 images, and scores need 2" in found["splits"].text


def test_the_index_of_a_run_is_not_made_again(
    pico_values: dict[str, Any], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = on_pictures(pico_values, pictures)
    run = open_run(Loaded(recipe, {}), out=tmp_path / "run")
    run.execute(list(run.graph.of_stage("data")))
    monkeypatch.setattr("deme_diffusion.doctor.data.scan", lambda *_: pytest.fail("the images were read again"))
    found = examined(recipe, tmp_path / "run")
    assert "indexed already" in found["data"].text
    assert found["model"].status == "ok"


@pytest.mark.parametrize(("free", "status"), [(0.5e9, "problem"), (1.05e9, "warning"), (2e9, "ok")])
def test_needs_are_compared_with_what_is_free(free: float, status: str) -> None:
    assert needs.compared("disk", 1e9, free, "here").status == status


def test_a_recipe_that_cannot_be_opened_is_a_problem_after_the_environment(
    pico_values: dict[str, Any], tmp_path: Path
) -> None:
    found = examined(on_pictures(pico_values, tmp_path / "nowhere"), tmp_path / "run")
    assert "no such file or folder" in found["recipe"].text
    assert found["torch"].status == "ok"


def test_settings_ask_for_their_packages(pico_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    decouple = pico_recipe.decouple.model_copy(update={"use_8bit_adam": True, "mixed_precision": "fp16"})
    monkeypatch.setattr(environment, "_version", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {f.topic: f for f in environment.wanted(pico_recipe.model_copy(update={"decouple": decouple}))}
    assert "deme-diffusion[8bit]" in found["decouple.use_8bit_adam"].text
    assert found["decouple.mixed_precision"].status == "problem"
    assert found["decouple.mixed_precision"].text.startswith("fp16 needs a GPU")
    on_gpu = pico_recipe.runtime.model_copy(update={"device": "cuda"})
    (lacking,) = environment.wanted(pico_recipe.model_copy(update={"runtime": on_gpu}))
    assert (lacking.status, lacking.topic) == ("problem", "runtime.device")


@pytest.mark.parametrize("indexed", [False, True])
def test_labels_that_a_classifier_would_lack_are_counted(
    pico_values: dict[str, Any], pictures: Path, tmp_path: Path, indexed: bool
) -> None:
    recipes = [on_pictures(pico_values, folder) for folder in (pictures, pictures / "a")]
    for recipe in recipes if indexed else ():
        run = open_run(Loaded(recipe, {}), out=tmp_path / "run")
        run.execute(list(run.graph.of_stage("data")))
        (tmp_path / "run" / "recipe.yaml").unlink()
    found = [examined(recipe, tmp_path / "run")["labels"] for recipe in recipes]
    assert (found[0].status, found[0].text) == ("ok", "all 37 images have one, for the classifier to learn")
    assert found[1].status == "problem"
    assert "pictures/a: the images have no labels, and the extractor is a classifier" in found[1].text


def test_the_extractor_is_asked_about_an_image(pico_values: dict[str, Any], tmp_path: Path) -> None:
    found = examined(parse(pico_values, where="pico"), tmp_path / "run")
    assert found["extractor"].text == "packaged:digits-cnn takes the images: 64 features"
    colour = save_classifier(tmp_path / "colour", channels=3)
    found = examined(parse({**pico_values, "extractor": {"pretrained": str(colour)}}, where="pico"), tmp_path / "run")
    assert found["extractor"].status == "ok", "grey images are repeated"
    torn = save_classifier(tmp_path / "torn", channels=3)
    (torn / "config.json").write_text("{}")
    found = examined(parse({**pico_values, "extractor": {"pretrained": str(torn)}}, where="pico"), tmp_path / "run")
    assert "config.json is not that of a SmallClassifier" in found["extractor"].text


def test_the_command_prints_a_line_a_check_and_exits_with_2_at_a_problem(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["digits", "data.source=folder", f"data.path={pictures}", "data.mode=L", "extractor.pretrained=null"]
    for extra, status in (["data.max_corrupt=0.2"], 0), ([], 2):
        monkeypatch.setattr("sys.argv", ["deme", "doctor", *words, "evaluate.num_images=64", "--json", *extra])
        with pytest.raises(SystemExit) as stopped:
            main()
        found = {entry["topic"]: entry for entry in json.loads(capsys.readouterr().out)}
        assert (stopped.value.code or 0) == status
        assert found["data"]["status"] == ("problem" if status else "ok")
