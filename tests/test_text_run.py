"""A whole text-to-image run on digits: prompts, CLIP scores, the page and the card; other prompts; the command."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from conftest import make_pico_values
from deme_diffusion.api import sample
from deme_diffusion.cli import main
from deme_diffusion.config import SamplerSettings
from deme_diffusion.data.splits import to_pixels
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.sample import IMAGES, image_seeds
from deme_diffusion.files import write_text
from deme_diffusion.pipeline.prompted import of_split
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.pipeline.stages import Stages
from deme_diffusion.recipes import load
from deme_diffusion.report.cells import direction
from deme_diffusion.report.verdict import verdict

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def values_of(pipeline: Path) -> dict[str, Any]:
    values = make_pico_values(pipeline)
    values["model"]["family"] = "stable_diffusion"
    values["clip"] = {"total_steps": 4, "train_batch_size": 8}
    values["evaluate"] |= {"clip_score": True, "num_images": 8, "loss": {"draws": 1, "num_images": 8}}
    values["merge"] |= {"search": "none"}
    values["evaluate"]["samplers"][0]["guidance_scale"] = 3.0
    values["analyze"] = {"figures": ["trajectory"], "trajectory_images": 4}
    return values


def opened(values: dict[str, Any], folder: Path) -> Run:
    file = folder.parent / f"{folder.name}.yaml"
    write_text(file, json.dumps(values))
    return open_run(load(str(file)), out=folder)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("text") / "pipeline")


@pytest.fixture(scope="module")
def run(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = opened(values_of(pipeline), tmp_path_factory.mktemp("runs") / "text")
    made.execute()
    made.report()
    return made


def scores_of(run: Run, column: str) -> dict[str, Any]:
    rows = json.loads((run.folder / "table.json").read_text())
    return {row["model"]: row["metrics"].get(column) for row in rows}


def test_every_model_has_a_clip_score_and_its_error(run: Run) -> None:
    for column in ("CLIP(digits-clip) DDIM-2-cfg3", "CLIP(digits-clip) DDPM-3"):
        found = scores_of(run, column)
        assert set(found) == {"base", "all-timesteps", "ensemble", "merged-uniform", "merged", "training images"}
        assert all(0 <= figure["mean"] <= 100 and figure["error"] > 0 for figure in found.values())
        assert found["base"]["protocol"]["prompts"] == "report split"
        assert found["training images"]["protocol"]["prompts"] == "the captions of each"
        assert direction(column) == "higher"
    text = (run.folder / "table.md").read_text()
    assert "standard error over images" in text
    assert (run.folder / "table.csv").read_text().splitlines()[0].endswith(",standard_error")
    rows = json.loads((run.folder / "table.json").read_text())
    said = verdict(rows).sentence
    assert "merged has CLIP(digits-clip) DDPM-3" in said
    assert "Nothing can be concluded from one training seed" in said
    fds = [f for row in rows for name, f in row["metrics"].items() if name.startswith("FD(") and f["mean"] is not None]
    assert fds and all(f["protocol"]["features"] >= f["n"] for f in fds), "which their protocol tells"
    assert said.startswith("FD of ") and "features is mostly bias: KID decides." in said


def test_images_are_asked_for_by_the_report_split_and_are_the_stock_pipelines(run: Run, pipeline: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    node = run.graph.samples[("base", 0)]
    folder = run.store.folder(node.key)
    prompts = json.loads((folder / "prompts.json").read_text())
    stages = Stages(run.graph, run.store)
    assert prompts == of_split(stages.splits["report"], range(8)) == stages.asked_by(8)
    assert prompts != stages.searched_by(8)
    stock = StableDiffusionPipeline.from_pretrained(pipeline)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    assert node.key.seed is not None
    seed = image_seeds(node.key.seed, 0, 8)[3]
    asked = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(seed)}
    made = stock(prompts[3], **asked, output_type="pt").images * 2 - 1
    apart = np.abs(to_pixels(made)[0].astype(int) - np.load(folder / IMAGES)[3].astype(int))
    assert apart.max() <= 1, "but for rounding of a batch"


def test_the_clip_scores_are_those_of_the_images_with_their_prompts(run: Run) -> None:
    stages = Stages(run.graph, run.store)
    node = next(n for n in run.graph.of_stage("clip_score") if "base DDIM" in n.label)
    images = run.store.folder(node.parents["images"].key)  # type: ignore[union-attr]
    prompts = json.loads((images / "prompts.json").read_text())
    scores, cut = stages.scorer.scores(iter([np.load(images / IMAGES)]), prompts)
    np.testing.assert_allclose(np.load(run.store.folder(node.key) / "scores.npy"), scores, atol=1e-4)
    told = scores_of(run, "CLIP(digits-clip) DDIM-2-cfg3")["base"]
    assert told["mean"] == pytest.approx(scores.mean())
    assert cut == 0


def test_the_page_and_the_card_say_what_was_asked(run: Run) -> None:
    page = (run.folder / "report.html").read_text()
    prompts = json.loads((run.store.folder(run.graph.samples[("base", 0)].key) / "prompts.json").read_text())
    assert f"<li>{prompts[0]}</li>" in page
    assert "What the images were asked for by" in page
    assert f"asked for by “{prompts[0]}”" in page, "the trajectory's caption"
    assert "CLIP score: how well an image fits its prompt" in page
    card = (run.folder / "model_card.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert f'images = pipeline("{prompts[0]}", num_inference_steps=2, guidance_scale=3).images' in card
    assert "type: clip_score" in card


def test_running_again_makes_nothing(run: Run, pipeline: Path) -> None:
    again = opened(values_of(pipeline), run.folder)
    assert all(again.store.status(node.key) == "done" for node in again.graph.nodes)


def test_other_prompts_share_the_models(run: Run, pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"the digit {i}" for i in range(8)))
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 11), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    values = values_of(pipeline)
    prompts = {"protocol": "file", "path": str(tmp_path / "prompts.txt"), "images": str(tmp_path)}
    values["evaluate"] |= {"prompts": prompts, "controls": []}
    values["analyze"] = {"figures": []}
    other = opened(values, run.folder.parent / "other")
    trained = [node for node in other.graph.nodes if node.stage in ("decouple", "merge", "clip")]
    assert trained
    assert all(other.store.status(node.key) == "done" for node in trained)
    other.execute(lambda graph: [node for name, _, node in graph.evaluations if name in ("base", "training images")])
    base = next(node for name, _, node in other.graph.evaluations if name == "base")
    told = json.loads((other.store.folder(base.key) / "metrics.json").read_text())
    assert told["reference_images"] == 12
    assert set(told["clip"]) == set(told["images"]) == {"DDIM-2-cfg3/0", "DDPM-3/0"}
    other.execute()
    rows, _ = other.report()
    real = next(row for row in rows if row["model"] == "training images")["metrics"]
    compared = [name for name in rows[0]["metrics"] if not name.startswith(("CLIP", "loss")) and "DD" in name]
    assert compared and set(real) == {*compared, *(f"CLIP(digits-clip) {one}" for one in ("DDIM-2-cfg3", "DDPM-3"))}
    for name, figure in real.items():
        if name in compared:
            assert figure["mean"] is None
            assert figure["reason"].startswith("training images are of another kind and size than the reference ")
        else:
            assert figure["mean"] is not None
    latency = rows[0]["metrics"]["latency (ms)"]["protocol"]
    assert latency["per"] == "step; the whole pipeline (text, steps and decoding) over its steps"
    assert latency["batch"] == min(16, other.recipe.runtime.sample_batch_size)


def test_without_reference_images_there_is_no_fd(run: Run, pipeline: Path, tmp_path: Path) -> None:
    rows = ["Prompt\tCategory", *(f"the digit {i}\t{'Odd' if i % 2 else 'Even'}" for i in range(8))]
    (tmp_path / "p.tsv").write_text("\n".join(rows))
    values = values_of(pipeline)
    values["evaluate"] |= {"prompts": {"protocol": "parti", "path": str(tmp_path / "p.tsv")}, "controls": []}
    values["analyze"] = {"figures": []}
    values["evaluate"]["samplers"] = [{"num_inference_steps": 1}, {"num_inference_steps": 2}]
    parti = opened(values, run.folder.parent / "parti")
    parti.execute()
    rows_made, said = parti.report()
    assert {name.split("(")[0].split()[0] for name in rows_made[0]["metrics"]} >= {"CLIP", "loss"}
    assert not any(name.startswith(("FD", "KID")) for row in rows_made for name in row["metrics"])
    assert said.sentence.startswith("merged has CLIP(digits-clip) DDIM-1 ")
    found = json.loads((parti.store.folder(parti.graph.evaluations[0][2].key) / "metrics.json").read_text())
    assert {name: one["n"] for name, one in found["clip"]["DDIM-1/0"]["categories"].items()} == {"Even": 4, "Odd": 4}


def test_images_of_seeds_are_asked_for_by_the_tables_prompts_or_by_others(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deme(*words: object) -> tuple[int, str]:
        """Exit status and what went to stderr; logging is left to pytest."""
        monkeypatch.setattr(sys, "argv", ["deme", *map(str, words)])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capfd.readouterr().err

    made = sample(run.folder, seeds=[2, 9], images=tmp_path / "own")
    told = json.loads((made.folder / "protocol.json").read_text())
    assert told["prompts"] == dict(zip(["2", "9"], of_split(stages_splits(run), [2, 9]), strict=True))
    options = {"guidance_scale": 2.0, "num_inference_steps": 2, "prompts": "a cat", "images": tmp_path / "cat"}
    cats = sample(run.folder, seeds=[0, 1], **options)  # type: ignore[arg-type]
    words = ["sample", run.merged, "--seeds", "0,1", "--prompts", "a cat", "--steps", "2", "--guidance", "2"]
    assert deme(*words, "--images", tmp_path / "plain")[0] == 0
    assert [file.read_bytes() for file in cats.files] == [
        (tmp_path / "plain" / file.name).read_bytes() for file in cats.files
    ]
    array = sample(run.folder, seeds=[0, 1], format="npy", **{**options, "images": tmp_path / "array"})  # type: ignore[arg-type]
    before = array.files[0].read_bytes()
    with pytest.raises(UserError, match='the image of seed 0 is there, asked for by "a cat", here by "a dog"'):
        sample(run.folder, seeds=[0, 1], format="npy", **{**options, "images": tmp_path / "array", "prompts": "a dog"})  # type: ignore[arg-type]
    assert array.files[0].read_bytes() == before
    status, said = deme("sample", run.merged, "--seeds", "0", "--images", tmp_path / "none")
    assert status == 2
    assert said.endswith("a pipeline that takes text, whose images need --prompts: a text or a file\n")
    status, said = deme("sample", run.folder, "--prompts", "a cat", "--images", tmp_path / "none")
    assert (status, said) == (2, "deme: --prompts: the table's images have their own; give --seeds\n")


@pytest.mark.parametrize("format", ["png", "npy"])
def test_what_a_sampler_refuses_leaves_no_folder(run: Run, tmp_path: Path, format: Any) -> None:
    total = run.graph.division.num_timesteps
    options = {"seeds": [0], "prompts": "a cat", "images": tmp_path / "own", "format": format}
    with pytest.raises(UserError, match=f"{total} steps of DDPMScheduler begin beyond"):
        sample(run.folder, sampler="DDPMScheduler", num_inference_steps=total, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "own").exists()


def stages_splits(run: Run) -> Any:
    return Stages(run.graph, run.store).splits["report"]


def test_the_playground_asks_by_seed(run: Run) -> None:
    from deme_diffusion.playground.answers import prompts
    from deme_diffusion.playground.session import Session
    from deme_diffusion.playground.worker import Ticket

    session = Session(run)
    told = prompts(session, range(3))
    assert told == [f"“{text}”" for text in of_split(stages_splits(run), range(3))]
    sampler = SamplerSettings(num_inference_steps=2, guidance_scale=3.0)
    played, _ = session.sample(None, sampler, [0, 1], Ticket())
    assert played.shape == (2, 8, 8, 1)
    session.close()
