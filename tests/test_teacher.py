"""The teacher: frozen in any precision, or the student's average, renewed and carried through checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import make_pico_denoiser
from deme_diffusion.config import DataSettings, DecoupleSettings, RuntimeSettings
from deme_diffusion.data.splits import Split, load_splits
from deme_diffusion.decoupling.step import Job, total
from deme_diffusion.decoupling.train import train
from deme_diffusion.files import read_jsonl
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.weights import WEIGHTS_NAME, load_state, state_digest


@pytest.fixture(scope="module")
def images() -> Split:
    return load_splits(DataSettings())["train"]


def job(*, steps: int = 6, weight: float = 1.0, learning_rate: float = 1e-2, **teacher: Any) -> Job:
    """An expert that learns from the given kind of teacher."""
    settings = DecoupleSettings(train_batch_size=4)
    techniques: dict[str, Any] = {"global_prob": 0.3, "consistency_weight": weight, "projection": "residual"}
    return Job("expert 0", settings, [[0, 10]], steps, learning_rate, 5, **techniques, **teacher)


def runtime(**options: Any) -> RuntimeSettings:
    return RuntimeSettings(**{"device": "cpu", "checkpointing_steps": 2, "checkpoints_total_limit": 9, **options})


def tensors(folder: Path) -> dict[str, bytes]:
    """All safetensors of a training, checkpoints included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def part(folder: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    """A part of a checkpoint, by its keys."""
    state = load_state(folder / "work" / f"checkpoint-{step:08d}" / "state.safetensors")
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}


# --- the student's average ----------------------------------------------------------------------------------------

AVERAGE: dict[str, Any] = {"teacher": "ema", "teacher_update_steps": 2}


def test_the_teacher_is_the_average_of_the_last_renewal(tmp_path: Path, images: Split) -> None:
    train(make_pico_denoiser(), images, job(teacher="ema", teacher_update_steps=4), tmp_path, runtime=runtime())
    base = list(make_pico_denoiser().module.parameters())
    at = {step: part(tmp_path, step, "teacher") for step in (2, 4, 6)}
    assert all(torch.equal(at[2][str(i)], value) for i, value in enumerate(base))
    assert not any(at[2][str(i)].any() for i in range(len(base), len(at[2])))  # the projections
    average = part(tmp_path, 4, "ema")
    assert at[4].keys() == average.keys()
    for step in (4, 6):
        assert all(torch.equal(at[step][key], value) for key, value in average.items())
    assert state_digest(at[4]) != state_digest(at[2])


def test_until_the_first_renewal_it_is_the_base(tmp_path: Path, images: Split) -> None:
    for name, teacher in (("ema", {"teacher": "ema", "teacher_update_steps": 3}), ("frozen", {})):
        train(make_pico_denoiser(), images, job(**teacher), tmp_path / name, runtime=runtime())
    ema, frozen = ([r["consistency"] for r in read_jsonl(tmp_path / n / "loss.jsonl")] for n in ("ema", "frozen"))
    assert ema[:3] == pytest.approx(frozen[:3], rel=1e-4, abs=1e-9)
    assert ema[3] < 0.9 * frozen[3]  # it has come after the student


def test_its_function_is_the_student_s_with_its_projections(tmp_path: Path, images: Split) -> None:
    """With an average that follows at once, the next step's teacher answers as its student: no consistency loss."""
    settings = DecoupleSettings(train_batch_size=4, ema_max_decay=0.0)
    base = job(teacher="ema", teacher_update_steps=1)
    follower = Job(**{**vars(base), "settings": settings})
    train(make_pico_denoiser(), images, follower, tmp_path, runtime=runtime())
    matrices = part(tmp_path, 6, "model")
    assert any(matrices[key].any() for key in matrices if "projection" in key)
    assert max(record["consistency"] for record in read_jsonl(tmp_path / "loss.jsonl")) < 1e-9


@pytest.mark.parametrize("at", [2, 4, 5])
def test_a_training_that_died_is_taken_up_to_the_bit(tmp_path: Path, images: Split, at: int) -> None:
    expert, calls = job(teacher="ema", teacher_update_steps=3), 0

    def dying(losses: dict[int, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > at:
            raise ZeroDivisionError
        return total(losses)

    train(make_pico_denoiser(), images, expert, tmp_path / "whole", runtime=runtime())
    with pytest.raises(ZeroDivisionError):
        train(make_pico_denoiser(), images, expert, tmp_path / "parts", runtime=runtime(), combine=dying)
    train(make_pico_denoiser(), images, expert, tmp_path / "parts", runtime=runtime())
    assert tensors(tmp_path / "parts") == tensors(tmp_path / "whole")
    assert (tmp_path / "parts" / "loss.jsonl").read_bytes() == (tmp_path / "whole" / "loss.jsonl").read_bytes()


def test_the_base_stays_as_it_was(tmp_path: Path, images: Split) -> None:
    denoiser = make_pico_denoiser()
    before = state_digest(denoiser.module.state_dict())
    train(denoiser, images, job(**AVERAGE), tmp_path, runtime=runtime())
    assert state_digest(denoiser.module.state_dict()) == before
    assert not any(module._forward_hooks for module in denoiser.module.modules())


def test_a_frozen_teacher_is_in_no_checkpoint(tmp_path: Path, images: Split) -> None:
    train(make_pico_denoiser(), images, job(steps=2), tmp_path, runtime=runtime())
    assert not part(tmp_path, 2, "teacher")


# --- its precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["frozen", "ema"])
def test_a_teacher_in_half_precision_answers_nearly_the_same(
    tmp_path: Path, images: Split, name: Any, kind: Any
) -> None:
    for folder, precision in (("half", name), ("float32", "float32")):
        expert = job(teacher=kind, teacher_dtype=precision, teacher_update_steps=2)
        train(make_pico_denoiser(), images, expert, tmp_path / folder, runtime=runtime())
    half, full = ([r["consistency"] for r in read_jsonl(tmp_path / n / "loss.jsonl")] for n in ("half", "float32"))
    assert half != full
    assert 0 < half[0] < 1e-3  # rounding alone
    assert half[-1] == pytest.approx(full[-1], rel=0.1)
    assert {t.dtype for t in load_state(tmp_path / "half" / "unet" / WEIGHTS_NAME).values()} == {torch.float32}


def seen(denoiser: DDPM, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The teachers that a denoiser gives, collected."""
    teachers, taught = [], denoiser.teacher

    @contextmanager
    def watched(dtype: torch.dtype | None) -> Iterator[nn.Module]:
        with taught(dtype) as teacher:
            teachers.append(teacher)
            yield teacher

    monkeypatch.setattr(denoiser, "teacher", watched)
    return teachers


def test_it_is_a_converted_copy_and_the_base_keeps_its_own(
    tmp_path: Path, images: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = make_pico_denoiser()
    before, teachers = copy.deepcopy(denoiser.module.state_dict()), seen(denoiser, monkeypatch)
    train(denoiser, images, job(teacher_dtype="bfloat16"), tmp_path, runtime=runtime())
    assert state_digest(denoiser.module.state_dict()) == state_digest(before)
    expected = {key: value.to(torch.bfloat16) for key, value in before.items()}
    assert state_digest(teachers[0].state_dict()) == state_digest(expected)
    assert not any(parameter.requires_grad for parameter in teachers[0].parameters())


def test_a_converted_teacher_whose_weights_were_changed_is_noticed(pico_denoiser: DDPM) -> None:
    with pytest.raises(AssertionError, match="teacher"), pico_denoiser.teacher(torch.bfloat16) as teacher:
        next(teacher.parameters()).data.add_(1)
