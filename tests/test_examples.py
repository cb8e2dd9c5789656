"""The examples run as they are, with settings made tiny, and end with what they promise."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from deme_diffusion.ablate import read_plan
from deme_diffusion.ablate.resolve import resolve
from deme_diffusion.recipes import load

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = [
    "decouple.total_steps=4",
    "decouple.validation_steps=2",
    "decouple.train_batch_size=8",
    "merge.num_images=32",
    "merge.scales=[1.0]",
    "merge.sampler={num_inference_steps: 2}",
    "evaluate.num_images=32",
    "evaluate.samplers=[{num_inference_steps: 3}, {name: DDPMScheduler, num_inference_steps: 2}]",
    "evaluate.loss={draws: 1}",
    "analyze.figures=[]",
    "runtime={jobs: 1, threads: 1, device: cpu}",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE_STEPS", "2")
    return tmp_path


def example(name: str, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *TINY, *overrides])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_digits_step_by_step(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example("digits_step_by_step.py", monkeypatch)
    said = capsys.readouterr().out
    assert "expert 1 of [500,1000): " in said and re.search(r"^merged +FD\(digits-cnn\) DDIM-3 ", said, re.MULTILINE)
    for grid in re.findall(r"^(?:base|merged): (.*grid\.png)$", said, re.MULTILINE):
        assert (place / grid).is_file()
    difference = re.search(r"largest difference to stock diffusers: ([\d.]+) of 255", said)
    assert difference and float(difference[1]) <= 0.51


def test_own_images_and_model(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example("own_images_and_model.py", monkeypatch, "extractor.total_steps=2")
    said = capsys.readouterr().out
    assert len(list((place / "own" / "shapes").glob("*/*.png"))) == 600
    assert (place / "own/runs/shapes/merged/model_index.json").is_file()
    assert (place / "own/runs/shapes/report.html").is_file()
    files = [line for line in said.splitlines() if line.endswith(".png")]
    assert len(files) == 8 and all((place / file).is_file() for file in files)


def test_there_is_a_test_for_every_example() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {"digits_step_by_step", "own_images_and_model"}


def test_the_plan_of_the_readme_can_be_carried_out_whole() -> None:
    plan, recipe = read_plan(EXAMPLES / "plan.md"), load("digits").recipe
    arms = [arm for ablation in plan.ablations for arm in resolve(ablation, recipe).arms]
    assert not plan.problems and [arm.status for arm in arms] == ["ready"] * 4
    assert [dict(arm.change) for arm in arms] == [
        {"merge.method": "none"},
        {"decouple.division": "overlapping", "decouple.overlap": 0.5},
        {"decouple.division": "log_snr"},
        {"decouple.consistency_weight": 0.0},
    ]
