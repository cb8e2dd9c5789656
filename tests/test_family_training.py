"""Training works alike for every latent family: exact to resume, in every precision, whatever memory is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deme_diffusion.config import LossSettings, TrainSettings
from deme_diffusion.data.loading import Order, steps
from deme_diffusion.decoupling.memory import estimate
from deme_diffusion.decoupling.step import TrainStep, total
from deme_diffusion.decoupling.student import student_of
from deme_diffusion.decoupling.switches import check_compiled, checkpoint_gradients, gradients
from deme_diffusion.decoupling.train import train
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.models.projection import fold_into
from deme_diffusion.weights import state_digest
from every_family import (
    FAMILIES,
    SUBSET,
    T,
    component_of,
    job_of,
    noised_of,
    opened,
    pipeline_of,
    runtime_of,
    split_of,
)

every_family = pytest.mark.parametrize("name", FAMILIES)
CPU = torch.device("cpu")


def trained(name: str, folder: Path, *, combine: Any = total, runtime: Any = None, **options: Any) -> Path:
    """One expert in a folder."""
    denoiser = opened(name)
    job = job_of(**options)
    train(denoiser, split_of(name), job, folder, runtime=runtime or runtime_of(), combine=combine)
    return folder


def tensors(folder: Path) -> dict[str, bytes]:
    """All safetensors of a training, its last checkpoint included, as bytes by their path."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
    return {name: value for name, value in found.items() if "checkpoint-00000002" not in name}


# --- whole trainings ----------------------------------------------------------------------------------------------


@every_family
def test_an_expert_at_learning_rate_0_is_the_base_to_the_bit(name: str, tmp_path: Path) -> None:
    denoiser = opened(name)
    folder = trained(name, tmp_path, steps=2, learning_rate=0.0)
    own, base = component_of(name, folder), denoiser.module.state_dict()
    assert own.keys() == base.keys()
    assert all(torch.equal(own[key], base[key]) for key in base)
    expert = fold_into(denoiser.component_from(folder), folder / denoiser.component)
    noised = noised_of(denoiser, name, [3, 3, 3])
    with torch.no_grad():
        assert torch.equal(denoiser.answer(expert, noised), denoiser.answer(denoiser.module, noised))


class Killed:
    """A `Combine` that dies in the micro-batch of a given number."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, losses: dict[int, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("as good as a kill")
        return total(losses)


@every_family
def test_four_steps_are_two_and_two_after_a_kill_to_the_bit_with_the_average_on_the_host_or_not(
    name: str, tmp_path: Path
) -> None:
    options = {"gradient_accumulation_steps": 2, "teacher_dtype": "bfloat16"}
    once = trained(name, tmp_path / "once", **options, runtime=runtime_of(offload_ema=True))
    with pytest.raises(ZeroDivisionError):
        trained(name, tmp_path / "twice", **options, combine=Killed(7))
    twice = trained(name, tmp_path / "twice", **options)
    assert tensors(once) == tensors(twice)
    assert (once / "loss.jsonl").read_text() == (twice / "loss.jsonl").read_text()
    base = opened(name).module.state_dict()
    moved = [key for key, value in component_of(name, once).items() if not torch.equal(value, base[key])]
    assert len(moved) > len(base) / 2


# --- steps --------------------------------------------------------------------------------------------------------


def one_step(denoiser: Denoiser, name: str, student: Any, teacher: Any, *, at: int = 0, **options: Any) -> Any:
    """The losses of the micro-batch of one step."""
    job = job_of(**options)
    order = Order(job.settings.train_batch_size)
    shape, empty = denoiser.sample_shape, job.settings.proportion_empty_prompts
    (batch,) = next(steps(split_of(name), order, seed=job.seed, start=at, stop=at + 1, shape=shape, empty=empty))
    return TrainStep(denoiser, job, CPU)(student, teacher, batch)[1]


@every_family
@pytest.mark.parametrize("global_prob", [0.0, 1.0])
def test_timesteps_are_drawn_inside_the_subset_or_everywhere(
    name: str, global_prob: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = opened(name)
    seen: list[int] = []

    def stopping(module: Any, noised: Any) -> torch.Tensor:
        seen.extend(noised.t.tolist())
        return torch.zeros_like(noised.x_t)

    monkeypatch.setattr(denoiser, "answer", stopping)
    for at in range(4):
        one_step(denoiser, name, denoiser.module, None, at=at, global_prob=global_prob, train_batch_size=16)
    (lo, hi), drawn = SUBSET[0], np.array(seen)
    inside = (lo <= drawn) & (drawn < hi)
    assert len(drawn) == 64
    assert inside.all() if global_prob == 0 else 0.2 < 1 - inside.mean() < 0.95
    assert set(drawn) == set(range(lo, hi)) if global_prob == 0 else drawn.min() < lo <= hi < drawn.max()


@every_family
def test_a_model_in_bfloat16_is_trained_on_float32_weights_noise_and_losses(name: str) -> None:
    half, full = opened(name, torch.bfloat16), opened(name)
    student = half.student()
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    for denoiser in (half, full):
        noised = noised_of(denoiser, name, [0, 0, 0])
        assert noised.x_t.dtype == noised.target.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = one_step(half, name, student, half.module, mixed_precision="bf16")
    exact = one_step(full, name, full.student(), full.module)
    assert mixed.loss.dtype == torch.float32
    torch.testing.assert_close(mixed.denoising, exact.denoising, rtol=0.05, atol=0.05)
    assert float(mixed.consistency.max()) < 0.02  # the student's float32 copy of a teacher in bfloat16


@every_family
def test_the_first_timesteps_have_their_noise_in_bfloat16_too(name: str) -> None:
    denoiser = opened(name, torch.bfloat16)
    noised, clean = (
        noised_of(denoiser, name, [0, 0, 0]),
        denoiser.encoded(split_of(name, count=3).view_batch(0))["latent"],
    )
    share = float((noised.x_t - clean).square().mean() / clean.square().mean())
    exact = noised_of(opened(name), name, [0, 0, 0])
    assert share > 1e-6
    torch.testing.assert_close(noised.x_t, exact.x_t, rtol=1e-6, atol=1e-6)


@every_family
def test_a_teacher_in_bfloat16_answers_as_the_base_does_and_leaves_it_as_it_was(name: str) -> None:
    denoiser = opened(name)
    before, noised = state_digest(denoiser.module.state_dict()), noised_of(denoiser, name, [3, 3, 3])
    with denoiser.teacher(torch.bfloat16) as teacher, torch.no_grad():
        assert torch.bfloat16 in {p.dtype for p in teacher.parameters()}
        answer, own = denoiser.answer(teacher, noised), denoiser.answer(denoiser.module, noised)
        assert answer.dtype == torch.bfloat16
        kind, folder = type(denoiser.module), pipeline_of(name) / denoiser.component
        loaded = denoiser.answer(kind.from_pretrained(folder, dtype=torch.bfloat16), noised)
    assert torch.equal(answer, loaded)  # as diffusers itself would have loaded it
    assert float((answer - own).norm() / own.norm()) < 0.03
    assert state_digest(denoiser.module.state_dict()) == before


@every_family
def test_checkpointing_gives_equal_gradients(name: str) -> None:
    denoiser, settings = opened(name), TrainSettings(train_batch_size=2)
    plain = gradients(denoiser, denoiser.student(), settings)
    student = denoiser.student()
    checkpoint_gradients(student)
    anew = gradients(denoiser, student, settings)
    assert plain.keys() == anew.keys() and len(plain) > 10
    for key, value in plain.items():
        torch.testing.assert_close(anew[key], value, rtol=1e-5, atol=1e-8)
    assert sum(float(value.abs().max()) > 0 for value in plain.values()) > 0.9 * len(plain)


@pytest.mark.slow
@every_family
def test_torch_captures_a_student_with_its_projections(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that compiling needs of a model; what is captured is run as it is."""
    compiling = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiling(module, backend="eager"))
    denoiser, job = opened(name), job_of()
    check_compiled(denoiser, student_of(denoiser, job, runtime_of(compile=True)).train(), job.settings)


@every_family
def test_memory_is_reckoned_with_conditions_and_less_of_it_with_checkpointing(name: str) -> None:
    denoiser, job = opened(name), job_of(train_batch_size=8)
    plain, anew = (estimate(denoiser, job, runtime_of(gradient_checkpointing=on), CPU) for on in (False, True))
    assert plain["weights"] >= sum(p.nbytes for p in denoiser.module.parameters())
    assert 0 < anew["activations"] <= plain["activations"]


# --- prompts and losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stable_diffusion", "dit"])
def test_prompts_are_dropped_at_their_share_whatever_the_batches(name: str) -> None:
    split, order = split_of(name), Order(40)
    key, nothing = ("label", -1) if name == "dit" else ("caption", "")

    def drawn(batch_size: int, start: int, empty: float) -> list[Any]:
        options = {"start": start, "stop": start + 1, "shape": (4, 4, 4), "empty": empty}
        (micro,) = steps(split, Order(batch_size, 40 // batch_size), seed=3, **options)
        values = [value for batch in micro for value in batch[key]]
        return [int(value) if name == "dit" else value for value in values]

    dropped = [[value == nothing for value in drawn(order.batch_size, k, 0.3)] for k in range(10)]
    assert 0.2 < np.mean(dropped) < 0.4
    assert drawn(8, 7, 0.3) == drawn(40, 7, 0.3)
    kept = [value for value, gone in zip(drawn(40, 7, 0.0), dropped[7], strict=True) if not gone]
    assert kept == [value for value, gone in zip(drawn(40, 7, 0.3), dropped[7], strict=True) if not gone]
    assert nothing not in drawn(40, 7, 0.0)
    assert set(drawn(40, 7, 1.0)) == {nothing}


@every_family
def test_the_overall_loss_weighs_ranges_by_the_density_of_t(name: str) -> None:
    denoiser, ranges = opened(name), [[[0, 5]], [[5, 12]], [[12, T]]]
    noise = FixedNoise(denoiser, split_of(name, "search", 6), ranges, LossSettings(draws=1))
    losses = noise.losses(denoiser.module)
    masses = [denoiser.mass(np.arange(*runs[0])) for runs in ranges]
    assert sum(masses) == pytest.approx(1)
    assert noise.overall(losses) == pytest.approx(float(np.dot(masses, losses)))
