"""One training in two processes: the same weights as in one at the doubled batch, written once, ended together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import make_pico_values
from deme_diffusion.artefacts import Store
from deme_diffusion.errors import UserError
from deme_diffusion.files import read_jsonl
from deme_diffusion.pipeline.engine import run_stages
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.recipes.checks import parse
from deme_diffusion.weights import WEIGHTS_NAME, load_state

HERE = Path(__file__).parent
STEPS = 12
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"timestep_sampling": "per_batch", "antithetic": True, "teacher": "ema", "teacher_update_steps": 2},
}


def two(function: str, *arguments: Any, processes: int = 2, **rest: Any) -> dict[str, Any]:
    """A call for `launch.py`."""
    return {"function": function, "arguments": arguments, "processes": processes, **rest}


def decouple(out: str, *more: str) -> tuple[str, ...]:
    """`deme decouple` of the first expert with two images a process."""
    return ("decouple", "pico.yaml", "--expert", "0", "--out", f"{out}/run", "decouple.train_batch_size=2", *more)


CALLS: dict[str, dict[str, Any]] = {
    **{f"{name} two": two("train_double", f"double/{name}/two", 2, mode) for name, mode in MODES.items()},
    **{f"{name} one": two("train_double", f"double/{name}/one", 4, mode, processes=1) for name, mode in MODES.items()},
    "whole": two("command", *decouple("whole")),
    "stopped": two("command", *decouple("parts"), stop=["parts/store/decouple/*/work/checkpoint-*/state.json", 1]),
    "resumed": two("command", *decouple("parts")),
    "again": two("command", *decouple("parts")),
    "alone": two("command", *decouple("alone", "decouple.train_batch_size=4"), processes=1),
    "resumed alone": two("command", "decouple", "parts/run", processes=1),
    "jobs": two("command", *decouple("jobs", "--jobs", "2")),
    "fp16": two("command", *decouple("fp16", "decouple.mixed_precision=fp16")),
    "full disk": two("command_on_a_full_disk", *decouple("full")),
    "python": two("run_from_python", "pico.yaml", "python/run"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> Path:
    """Where all calls have run."""
    folder = tmp_path_factory.mktemp("launches")
    values = make_pico_values(pico_pipeline)
    # A large epsilon: the bias of attention keys has a gradient of 0 but for rounding, which Adam would blow up.
    values["decouple"] |= {"total_steps": 2 * STEPS, "validation_steps": 4, "adam_epsilon": 0.01}
    values["runtime"] |= {"checkpointing_steps": 2, "checkpoints_total_limit": 20, "dataloader_num_workers": 1}
    values["evaluate"] |= {"controls": []}
    (folder / "pico.yaml").write_text(yaml.safe_dump(values))
    (folder / "calls.json").write_text(json.dumps(list(CALLS.values())))
    command = [sys.executable, str(HERE / "launch.py"), "calls.json", "results.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return folder


@pytest.fixture(scope="module")
def said(place: Path) -> dict[str, list[dict[str, Any]]]:
    """What each process of each call ended with."""
    return dict(zip(CALLS, json.loads((place / "results.json").read_text()), strict=True))


def statuses(results: list[dict[str, Any]]) -> list[int | None]:
    return [result["status"] for result in results]


def artefact(place: Path, name: str) -> Path:
    """The one training of a call that is done."""
    (manifest,) = (place / name / "store" / "decouple").glob("*/manifest.json")
    return manifest.parent


@pytest.mark.parametrize("mode", MODES)
def test_in_float64_two_processes_give_the_weights_of_one_at_the_doubled_batch(
    place: Path, said: dict[str, list[dict[str, Any]]], mode: str
) -> None:
    assert statuses([*said[f"{mode} two"], *said[f"{mode} one"]]) == [0, 0, 0], said[f"{mode} two"]
    for kept in ("unet", "raw"):
        one, two_ = (load_state(place / "double" / mode / name / kept / WEIGHTS_NAME) for name in ("one", "two"))
        assert one.keys() == two_.keys()
        assert {tensor.dtype for tensor in one.values()} == {torch.float64}
        difference = sum(float((one[key] - two_[key]).square().sum()) for key in one) ** 0.5
        assert difference <= 1e-9 * sum(float(tensor.square().sum()) for tensor in one.values()) ** 0.5
    for a, b in zip(
        *(read_jsonl(place / "double" / mode / name / "loss.jsonl") for name in ("one", "two")), strict=True
    ):
        assert a["ranges"].keys() == b["ranges"].keys()
        for key in ("loss", "denoising", "consistency", "gradient_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-15)


def test_the_weights_moved_and_the_modes_differ(place: Path, said: dict[str, list[dict[str, Any]]]) -> None:
    """Or the test above would tell nothing."""
    plain, batch = (load_state(place / "double" / mode / "one" / "raw" / WEIGHTS_NAME) for mode in MODES)
    assert max(float((plain[key] - batch[key]).abs().max()) for key in plain) > 1e-4


def test_the_command_trains_in_two_processes_and_one_of_them_speaks_and_writes(
    place: Path, said: dict[str, list[dict[str, Any]]]
) -> None:
    main, other = said["whole"]
    assert statuses([main, other]) == [0, 0], other["err"]
    assert "expert 0" in main["out"]
    assert "done in" in main["err"]
    assert (other["out"], other["err"]) == ("", "")
    folder = artefact(place, "whole")
    assert [record["step"] for record in read_jsonl(folder / "loss.jsonl")] == list(range(1, STEPS + 1))
    assert [record["step"] for record in read_jsonl(folder / "validation.jsonl")] == [4, 8, 12]
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert "processes: 2" in (place / "whole" / "run" / "recipe.yaml").read_text()


def test_it_equals_one_process_at_the_doubled_batch(place: Path, said: dict[str, list[dict[str, Any]]]) -> None:
    assert statuses(said["alone"]) == [0], said["alone"][0]["err"]
    alone, both = artefact(place, "alone"), artefact(place, "whole")
    assert alone.name != both.name  # another batch size, and other processes, are another training
    one, two_ = (load_state(folder / "unet" / WEIGHTS_NAME) for folder in (alone, both))
    for key in one:
        torch.testing.assert_close(two_[key], one[key], rtol=0, atol=2e-5)
    for name, keys in (("loss.jsonl", ("loss", "gradient_norm")), ("validation.jsonl", ("own", "validation"))):
        for a, b in zip(read_jsonl(alone / name), read_jsonl(both / name), strict=True):
            assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=1e-3)


def test_stopped_and_run_again_it_is_as_if_it_had_never_been(
    place: Path, said: dict[str, list[dict[str, Any]]]
) -> None:
    main, other = said["stopped"]
    assert statuses([main, other]) == [130, 130]
    assert main["err"].count("deme: interrupted: expert 0") == 1
    assert other["err"] == ""
    assert statuses(said["resumed"]) == [0, 0], said["resumed"]
    assert said["resumed"][0]["err"].count("going on after step") == 1
    whole, parts = artefact(place, "whole"), artefact(place, "parts")
    assert whole.name == parts.name
    for name in (f"unet/{WEIGHTS_NAME}", f"raw/{WEIGHTS_NAME}", "loss.jsonl", "validation.jsonl"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert statuses(said["again"]) == [0, 0]
    assert "1 of 1 stages are done already" in said["again"][0]["err"]


def test_a_run_of_two_processes_is_not_taken_up_by_one(said: dict[str, list[dict[str, Any]]]) -> None:
    (result,) = said["resumed alone"]  # which asks for the second expert as well
    assert result["status"] == 2
    assert "processes=2, but 1 run; start it by torchrun --nproc_per_node 2 -m deme_diffusion" in result["err"]


@pytest.mark.parametrize(
    "call, status, line",
    [
        ("jobs", 2, "runtime.jobs=2: each training runs in all 2 processes of this launch"),
        ("fp16", 2, "decouple.mixed_precision: fp16 needs a GPU"),
        ("full disk", 1, "checkpoint: no space left on device"),
    ],
)
def test_an_error_ends_both_and_is_told_once(
    said: dict[str, list[dict[str, Any]]], call: str, status: int, line: str
) -> None:
    main, other = said[call]
    assert statuses([main, other]) == [status, status], other["err"]
    assert main["err"].count(f"deme: {line}") == 1
    assert "Traceback" not in main["err"] + other["err"]
    assert line not in other["err"]


def test_from_python_both_get_the_result_of_a_whole_run(place: Path, said: dict[str, list[dict[str, Any]]]) -> None:
    assert statuses(said["python"]) == [0, 0], said["python"]
    assert [json.loads(result["out"])[0] for result in said["python"]] == ["python/run", "python/run"]
    assert (place / "python" / "run" / "report.html").is_file()


@pytest.mark.slow
def test_torchrun_itself(place: Path, said: dict[str, list[dict[str, Any]]]) -> None:
    """The other tests stand in for it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "deme_diffusion"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *decouple("torchrun")], cwd=place, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("expert 0") == 1
    kept = f"unet/{WEIGHTS_NAME}"
    assert (artefact(place, "torchrun") / kept).read_bytes() == (artefact(place, "whole") / kept).read_bytes()


# --- runtime.jobs -------------------------------------------------------------------------------------------------


def test_what_a_worker_process_cannot_open_is_told_as_it_is(
    tmp_path: Path, pico_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as a process that died."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    base = Path(shutil.copytree(pico_pipeline, tmp_path / "base"))
    values = make_pico_values(base)
    graph = Graph(parse({**values, "runtime": {**values["runtime"], "jobs": 2}}, where="pico"), download=True)
    shutil.rmtree(base)
    with pytest.raises(UserError, match="base"):
        run_stages(graph, Store(tmp_path / "store"), graph.experts[0], finished=lambda *_: None)
