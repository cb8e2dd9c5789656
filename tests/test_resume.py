"""The command itself, killed and interrupted: run again, it leaves what an uninterrupted run leaves, to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import make_pico_denoiser, make_pico_values, save_pipeline
from deme_diffusion.files import read_jsonl

STEPS = 30
PATIENCE = 90.0
"""Seconds that a process may take, its imports included, on a busy machine."""


@dataclass(frozen=True)
class Place:
    """A run folder with a store of its own beside it."""

    root: Path
    recipe: Path

    def start(self) -> subprocess.Popen[str]:
        """`deme decouple RECIPE --expert 0`, in a process group of its own as a shell would start it."""
        command = [sys.executable, "-m", "deme_diffusion.cli", "decouple", str(self.recipe), "--expert", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            [*command, "--out", str(self.root / "run")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> str:
        """Run to the end; what it logged."""
        _, errors = (process := self.start()).communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        return errors

    def stop(self, number: signal.Signals, *, after: int, delay: float = 0.0, group: bool = True) -> tuple[int, str]:
        """Run until `after` steps are in a checkpoint and `delay` seconds more, then send the signal."""
        process, deadline = self.start(), time.monotonic() + PATIENCE
        while self.checkpointed() < after:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, f"no checkpoint after {PATIENCE} s"
            time.sleep(0.002)
        time.sleep(delay)
        (os.killpg if group else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, errors

    def checkpointed(self) -> int:
        """Steps of the newest whole checkpoint."""
        records = self.root.glob("store/decouple/*/work/checkpoint-*/state.json")
        return max((int(path.parent.name.removeprefix("checkpoint-")) for path in records), default=0)

    def artefact(self) -> dict[str, bytes]:
        """What the training left, logs included; not the manifest, which knows the time it took."""
        (folder,) = [path for path in (self.root / "store" / "decouple").iterdir() if path.is_dir()]
        assert not (folder / "work").exists()
        kept = [*folder.rglob("*.safetensors"), *folder.glob("*.jsonl")]
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(kept)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Accumulation 4, EMA, augmentation, dropout, two loader workers, the best kept."""
    folder = tmp_path_factory.mktemp("recipe")
    values: dict[str, Any] = make_pico_values(save_pipeline(make_pico_denoiser(dropout=0.1), folder / "base"))
    values["data"] = {"augment": {"shift": 1.0, "rotate": 10.0}}
    values["decouple"] |= {
        "total_steps": 2 * STEPS,
        "gradient_accumulation_steps": 4,
        "validation_steps": 5,
        "keep": "best",
    }
    values["runtime"] |= {"dataloader_num_workers": 2, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    (folder / "pico.yaml").write_text(yaml.safe_dump(values))
    return folder / "pico.yaml"


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one run leaves."""
    place = Place(tmp_path_factory.mktemp("uninterrupted"), recipe)
    place.finish()
    artefact = place.artefact()
    assert {path.split("/")[0] for path in artefact} == {"unet", "raw", "loss.jsonl", "validation.jsonl"}
    return artefact


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_the_weights_are_the_same_to_the_bit(
    tmp_path: Path, recipe: Path, uninterrupted: dict[str, bytes]
) -> None:
    place, draw = Place(tmp_path, recipe), random.Random(0)
    for part in range(3):
        after = draw.randrange(8 * part + 1, 8 * part + 6)
        # A kill of the process alone leaves its loaders behind, as the out-of-memory killer does.
        status, errors = place.stop(signal.SIGKILL, after=after, delay=draw.uniform(0, 0.1), group=part > 0)
        assert status == -signal.SIGKILL, errors
        assert place.checkpointed() < STEPS
    assert "going on after step" in place.finish()
    assert place.artefact() == uninterrupted
    (losses,) = tmp_path.glob("store/decouple/*/loss.jsonl")
    assert [record["step"] for record in read_jsonl(losses)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_sigint_and_sigterm_checkpoint_say_how_to_go_on_and_exit_130(
    tmp_path: Path, recipe: Path, uninterrupted: dict[str, bytes]
) -> None:
    place = Place(tmp_path, recipe)
    for number, after in ((signal.SIGINT, 5), (signal.SIGTERM, 15)):  # to the group, as a terminal or scheduler does
        status, errors = place.stop(number, after=after)
        assert status == 130, errors
        assert "Traceback" not in errors
        step = place.checkpointed()
        last_line = errors.strip().splitlines()[-1]
        assert last_line.startswith("deme: interrupted: expert 0")
        assert f"checkpoint written after step {step} of {STEPS}; run the same command again to go on" in last_line
    assert f"going on after step {step} of {STEPS}" in place.finish()
    assert place.artefact() == uninterrupted
