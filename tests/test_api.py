"""The method from Python: parts that share one run folder, samples by seed, and a package that imports at once."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import deme_diffusion
from conftest import T, make_pico_values
from deme_diffusion import decouple, evaluate, merge, run, sample
from deme_diffusion.artefacts import Store
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.export import check_seeds, parse_seeds, short

Recipe = Path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> Recipe:
    """The pico recipe with two training seeds, in a folder that all tests of this file share."""
    file = tmp_path_factory.mktemp("api") / "pico.yaml"
    file.write_text(yaml.safe_dump({**make_pico_values(pico_pipeline), "seeds": [0, 1]}))
    return file


@pytest.fixture
def out(recipe: Recipe) -> Path:
    return recipe.parent / "runs" / "pico"


def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*_: object) -> None:
        raise AssertionError("a stage was made again")

    monkeypatch.setattr(Store, "produce", compute)


def test_parts_in_turn_make_what_run_makes_and_nothing_twice(
    recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = decouple(recipe, out=out)
    assert [(e.seed, e.index, e.timesteps) for e in experts] == [
        (0, 0, "[0,10)"), (0, 1, "[10,20)"), (1, 0, "[0,10)"), (1, 1, "[10,20)")]  # fmt: skip
    assert all((e.folder / "unet" / "config.json").is_file() for e in experts)
    merged = merge(recipe, out=out)
    assert [m.seed for m in merged] == [0, 1]
    for one in merged:
        weights = json.loads((one.folder / "manifest.json").read_text())["results"]["weights"]
        assert list(one.weights) == weights and len(weights) == 2 and one.source
        assert (one.folder / "model_index.json").is_file()
    table = evaluate(recipe, out=out)
    assert table == json.loads((out / "table.json").read_text())
    nothing_is_made(monkeypatch)
    result = run(recipe, out=out)
    assert result.table == table and result.merged is not None
    assert result.merged.resolve() == merged[0].folder.resolve()
    assert merge(recipe, out=out) == merged and decouple(recipe, out=out) == experts


def test_given_weights_come_from_the_recipe(recipe: Recipe, out: Path) -> None:
    given = ["merge.search=none", "merge.weights=[0.25, 0.5]", "seeds=[0]"]
    one = merge(recipe, *given, out=out.parent / "given")[0]
    assert (one.weights, one.source, one.rules) == ((0.25, 0.5), "the recipe", {})
    ruled = [*given, "merge.weights_for={conv_in.*: [1, 0]}"]
    assert merge(recipe, *ruled, out=out.parent / "given")[0].rules == {"conv_in.*": (1.0, 0.0)}


def test_nothing_to_merge_is_refused(recipe: Recipe, out: Path) -> None:
    with pytest.raises(UserError, match=r"merge\.method: none, so there is nothing to merge"):
        merge(recipe, "merge.method=none", out=out.parent / "unmerged")


def test_sampled_png_is_the_stock_pipeline_s_image_of_that_seed(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    from diffusers import DDIMPipeline

    made = sample(recipe, seeds=[3, 0], images=tmp_path / "images", num_inference_steps=4, out=out)
    assert [file.name for file in made.files] == ["seed-00000003.png", "seed-00000000.png"]
    assert made.sampler == "DDIM-4" and made.model == "merged"
    pipeline = DDIMPipeline.from_pretrained(merge(recipe, out=out)[0].folder)
    pipeline.set_progress_bar_config(disable=True)
    for seed, file in zip(made.seeds, made.files, strict=True):
        generator = torch.Generator().manual_seed(seed)
        stock = pipeline(generator=generator, num_inference_steps=4, output_type="np").images[0, ..., 0]
        with Image.open(file) as image:
            assert image.mode == "L"
            assert np.abs(np.asarray(image) - stock * 255).max() < 0.51


def test_models_of_a_run_are_sampled_by_name(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    images = {
        name: sample(recipe, seeds=range(2), model=name, images=tmp_path / name, format="npy", out=out).files[0]
        for name in ("base", "all-timesteps", "ensemble", "merged-uniform", "expert-1")
    }
    pixels = {name: np.load(file) for name, file in images.items()}
    assert {p.shape for p in pixels.values()} == {(2, 8, 8, 1)}
    digests = {json.loads((file.parent / "protocol.json").read_text())["model_digest"] for file in images.values()}
    assert len(digests) == 5
    with pytest.raises(UserError, match=r"--model ensembel: the run has base, .*did you mean 'ensemble'"):
        sample(recipe, seeds=[0], model="ensembel", out=out)


def test_samples_resume_and_grow_and_are_never_mixed(
    recipe: Recipe, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"images": tmp_path / "images", "model": "base", "out": out}
    first = sample(recipe, seeds=[0, 1, 2], **options)
    whole = [file.read_bytes() for file in first.files]
    first.files[1].unlink()
    kept = first.files[0].stat().st_mtime_ns
    again = sample(recipe, seeds=[1, 2, 7], grid=True, **options)
    assert first.files[0].stat().st_mtime_ns == kept
    assert [file.read_bytes() for file in first.files] == whole
    assert json.loads((tmp_path / "images" / "protocol.json").read_text())["seeds"] == "0-2,7"
    assert (again.folder / "grid.png").is_file()
    before = sorted(path.name for path in again.folder.iterdir())
    with pytest.raises(UserError, match=r"holds other images \(model is \"base\" there, \"merged\" here\)"):
        sample(recipe, seeds=[0], **{**options, "model": "merged"})
    with pytest.raises(UserError, match=r"holds other images \(sampler is "):
        sample(recipe, seeds=[0], eta=0.5, **options)
    with pytest.raises(UserError, match=r"holds other images \(format is \"png\" there, \"npy\" here\)"):
        sample(recipe, seeds=[0], format="npy", **options)
    assert sorted(path.name for path in again.folder.iterdir()) == before
    monkeypatch.setattr("deme_diffusion.evaluation.sample.sample", None)  # nothing is left to sample
    assert sample(recipe, seeds=[0, 1, 2, 7], **options).seeds == [0, 1, 2, 7]


def test_array_resumes_and_does_not_change_its_seeds(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"images": tmp_path / "images", "model": "base", "format": "npy", "out": out}
    made = sample(recipe, seeds=[4, 2], **options)
    assert json.loads((made.folder / "seeds.json").read_text()) == [4, 2]
    with pytest.raises(UserError, match=r"holds other images \(seeds is \"4,2\" there, \"2,4\" here\)"):
        sample(recipe, seeds=[2, 4], **options)
    pngs = sample(recipe, seeds=[2, 4], model="base", images=tmp_path / "pngs", out=out)
    with Image.open(pngs.files[1]) as image:
        np.testing.assert_allclose(np.asarray(image), np.load(made.files[0])[0, ..., 0], atol=1)


def test_folder_of_other_files_is_refused_and_left_alone(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds files that are not ours; give a new or empty folder"):
        sample(recipe, seeds=[0], images=tmp_path, out=out)
    with pytest.raises(UserError, match="a file, where a folder is needed"):
        sample(recipe, seeds=[0], images=tmp_path / "holiday.png", out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.png"]


def test_sampler_settings_that_would_be_ignored_are_refused(recipe: Recipe, out: Path) -> None:
    with pytest.raises(UserError, match=f"--sampler: {T + 1} steps of DDIMScheduler"):
        sample(recipe, seeds=[0], num_inference_steps=T + 1, out=out)
    with pytest.raises(UserError, match="--sampler: DDPMScheduler has no eta"):
        sample(recipe, seeds=[0], sampler="DDPMScheduler", eta=1.0, out=out)
    with pytest.raises(UserError, match=r"--sampler: eta: Input should be less than or equal to 1 \(given: 2\.0\)"):
        sample(recipe, seeds=[0], eta=2.0, out=out)
    with pytest.raises(UserError, match=r"--format pgn: png or npy; did you mean 'png'\?"):
        sample(recipe, seeds=[0], format="pgn", out=out)  # type: ignore[arg-type]


# seeds


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", [0]), ("0,1,5-9", [0, 1, 5, 6, 7, 8, 9]), ("3, 1-2", [3, 1, 2]), ("7-7", [7])]
)
def test_seed_lists(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds
    assert parse_seeds(short(seeds)) == seeds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5-2", "--seeds 5-2: '5-2' runs backwards; did you mean '2-5'?"),
        ("a", "--seeds a: 'a' is no seed and no range of seeds, as in 0,1,5-9"),
        ("-1", "--seeds -1: '-1' is no seed"),
        ("1.5", "--seeds 1.5: '1.5' is no seed"),
        ("", "--seeds : '' is no seed"),
        ("0,,1", "--seeds 0,,1: '' is no seed"),
        ("1,0-3", "--seeds 1,0-3: 1 is there twice"),
        ("0-99999999999", "--seeds 0-99999999999: more than 1,000,000 seeds"),
        (str(2**63), f"--seeds {2**63}: {2**63} is no seed; 0 to 2**63 - 1 are"),
    ],
)
def test_wrong_seed_lists_are_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_seeds(text)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_seeds_from_python_are_checked_too() -> None:
    assert check_seeds(range(3)) == [0, 1, 2]
    for wrong, said in (([-1], "-1 is no seed"), ([1, 1], "1 is there twice"), ([], "no seed is given")):
        with pytest.raises(UserError, match=said):
            check_seeds(wrong)


# the door itself


def test_import_is_free_of_torch_and_of_anything_slow() -> None:
    heavy = ("torch", "diffusers", "numpy", "pydantic", "yaml")
    script = f"import sys, deme_diffusion; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_that_is_exported_exists_and_says_what_it_returns_and_raises() -> None:
    for name in deme_diffusion.__all__:
        exported = getattr(deme_diffusion, name)
        assert inspect.getdoc(exported), name
        if inspect.isfunction(exported):
            assert "Raises" in (inspect.getdoc(exported) or ""), name
            assert "return" in exported.__annotations__, name
