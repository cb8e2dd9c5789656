"""The loop of one training: exact to resume, EMA, checkpoints, early stopping, schedules, and how it fails."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import T, make_pico_denoiser
from deme_diffusion.config import AugmentSettings, DataSettings, DecoupleSettings, LossSettings, RuntimeSettings
from deme_diffusion.data.splits import Split, load_splits
from deme_diffusion.decoupling import waiting
from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.journal import Journal
from deme_diffusion.decoupling.progress import Progress
from deme_diffusion.decoupling.signals import stop_signals
from deme_diffusion.decoupling.step import Job, StepLosses, total
from deme_diffusion.decoupling.train import MOST_SKIPPED, _update, train
from deme_diffusion.decoupling.waiting import Waited
from deme_diffusion.division import Runs, reported, whole
from deme_diffusion.errors import Interrupted, MachineError, UserError
from deme_diffusion.files import read_jsonl
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.models.projection import FILE as MATRICES
from deme_diffusion.models.projection import fold_into
from deme_diffusion.weights import WEIGHTS_NAME, load_state, state_digest

SUBSET: Runs = [[0, 10]]
AUGMENT = AugmentSettings(shift=1.0, rotate=10.0, flip=0.5)


@pytest.fixture(scope="module")
def images() -> Split:
    """Augmented training images."""
    return load_splits(DataSettings(augment=AUGMENT))["train"]


@pytest.fixture(scope="module")
def held_out() -> Split:
    """A few images of the search split."""
    split = load_splits(DataSettings())["search"]
    return replace(split, indices=split.indices[:16])


def job(*, steps: int = 4, subset: Runs = SUBSET, **options: Any) -> Job:
    """An expert with every technique on, unless options say otherwise."""
    own = {"global_prob": 0.3, "consistency_weight": 1.0, "projection": "residual", "seed": 5, "learning_rate": 1e-2}
    own |= {key: options.pop(key) for key in list(own) if key in options}
    settings = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "validation_steps": 2, **options}
    return Job("expert 0", DecoupleSettings(**settings), subset, steps, **own)


def measure(denoiser: DDPM, split: Split, subset: Runs = SUBSET) -> FixedNoise:
    """The fixed-noise loss by which a job validates."""
    return FixedNoise(denoiser, split, reported(subset, T), LossSettings(draws=1))


def runtime(**options: Any) -> RuntimeSettings:
    """On the CPU, a checkpoint at every second step."""
    return RuntimeSettings(**{"device": "cpu", "checkpointing_steps": 2, "checkpoints_total_limit": 4, **options})


@dataclass
class Stopping:
    """A Combine that sends this process a signal, or raises, in the micro-batch of a given number."""

    at: int
    number: signal.Signals | None = None
    calls: int = field(default=0)

    def __call__(self, losses: dict[int, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            if self.number is None:
                raise ZeroDivisionError("as good as a kill")
            os.kill(os.getpid(), self.number)
        return total(losses)


def tensors(folder: Path) -> dict[str, bytes]:
    """All safetensors of a training, checkpoints included, as bytes by their path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def component(folder: Path) -> dict[str, torch.Tensor]:
    """The kept weights."""
    return load_state(folder / "unet" / WEIGHTS_NAME)


# --- resume -------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {"gradient_accumulation_steps": 4, "keep": "best", "use_ema": True}


def everything(folder: Path, images: Split, held_out: Split, *, combine: Any = total, **options: Any) -> dict[str, Any]:
    """Accumulation 4, EMA, augmentation, dropout, two workers, and the best kept."""
    denoiser = make_pico_denoiser(dropout=0.1)
    validation = measure(denoiser, held_out)
    settings = runtime(dataloader_num_workers=2, **options)
    return train(
        denoiser, images, job(**EVERYTHING), folder, runtime=settings, validation=validation, combine=combine
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, images: Split, held_out: Split) -> Path:
    """Four steps at once."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    everything(folder, images, held_out)
    return folder


def assert_same_training(one: Path, two: Path) -> None:
    """Weights, EMA, optimizer and logs are equal to the bit; each step stands once."""
    ours, theirs = tensors(one), tensors(two)
    last = "work/checkpoint-00000004/state.safetensors"
    for name in (f"unet/{WEIGHTS_NAME}", f"unet/{MATRICES}", f"raw/{WEIGHTS_NAME}", f"raw/{MATRICES}", last):
        assert ours[name] == theirs[name], name
    parts = {key.split("/")[0] for key in load_state(one / last)}
    assert parts == {"model", "optimizer", "ema"}
    for name in ("loss.jsonl", "validation.jsonl"):
        assert (one / name).read_text() == (two / name).read_text()
    assert [record["step"] for record in read_jsonl(one / "loss.jsonl")] == [1, 2, 3, 4]
    assert [record["step"] for record in read_jsonl(one / "validation.jsonl")] == [2, 4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_four_steps_are_two_and_a_signal_and_two_more_to_the_bit(
    tmp_path: Path, images: Split, held_out: Split, uninterrupted: Path, number: signal.Signals
) -> None:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(Interrupted, match="expert 0: checkpoint written after step 2 of 4"):
        everything(tmp_path, images, held_out, combine=Stopping(6, number), checkpointing_steps=100)
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert len(read_jsonl(tmp_path / "loss.jsonl")) == 2
    results = everything(tmp_path, images, held_out)
    assert results["steps"] == results["updates"] == 4
    assert_same_training(tmp_path, uninterrupted)


@pytest.mark.parametrize("micro_batch", [3, 7, 11, 16])
def test_a_training_that_died_anywhere_is_taken_up_to_the_bit(
    tmp_path: Path, images: Split, held_out: Split, uninterrupted: Path, micro_batch: int
) -> None:
    with pytest.raises(ZeroDivisionError):
        everything(tmp_path, images, held_out, combine=Stopping(micro_batch))
    assert len(read_jsonl(tmp_path / "loss.jsonl")) == (micro_batch - 1) // 4
    everything(tmp_path, images, held_out)
    assert_same_training(tmp_path, uninterrupted)


def test_a_signal_in_the_last_step_is_not_lost(tmp_path: Path, images: Split, held_out: Split) -> None:
    """Whoever presses Ctrl-C wants the stages after this one to stop as well."""
    with pytest.raises(Interrupted, match="after step 4 of 4"):
        everything(tmp_path, images, held_out, combine=Stopping(16, signal.SIGINT))
    counting = Stopping(at=0)
    assert everything(tmp_path, images, held_out, combine=counting)["steps"] == 4
    assert counting.calls == 0
    assert (tmp_path / "unet" / WEIGHTS_NAME).exists()


def test_a_signal_that_comes_twice_at_once_is_one_wish_to_stop() -> None:
    with stop_signals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()


def test_lines_of_a_step_that_no_checkpoint_knows_are_written_once(
    tmp_path: Path, images: Split, held_out: Split, uninterrupted: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        everything(tmp_path, images, held_out, combine=Stopping(16))  # the third step is in no checkpoint
    with (tmp_path / "loss.jsonl").open("a") as file:
        file.write('{"step": 4, "los')  # cut short by a kill
    everything(tmp_path, images, held_out)
    assert (tmp_path / "loss.jsonl").read_text() == (uninterrupted / "loss.jsonl").read_text()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm, name",
    [
        (truncate, "state.safetensors"),
        (truncate, "state.json"),
        (flip, "state.safetensors"),
        (Path.unlink, "state.safetensors"),
        (Path.unlink, "state.json"),
    ],
)
def test_a_broken_newest_checkpoint_is_passed_over(
    tmp_path: Path,
    images: Split,
    held_out: Split,
    uninterrupted: Path,
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[Path], None],
    name: str,
) -> None:
    with pytest.raises(ZeroDivisionError):
        everything(tmp_path, images, held_out, combine=Stopping(13), checkpointing_steps=1)
    newest = tmp_path / "work" / "checkpoint-00000003"
    harm(newest / name)
    with caplog.at_level(logging.INFO):
        everything(tmp_path, images, held_out)
    assert "checkpoint-00000003 is not whole" in caplog.text
    assert "going on after step 2 of 4" in caplog.text
    assert_same_training(tmp_path, uninterrupted)


def test_only_broken_checkpoints_mean_a_start_from_the_beginning(
    tmp_path: Path, images: Split, held_out: Split, uninterrupted: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        everything(tmp_path, images, held_out, combine=Stopping(13))
    truncate(tmp_path / "work" / "checkpoint-00000002" / "state.safetensors")
    everything(tmp_path, images, held_out)
    assert_same_training(tmp_path, uninterrupted)


@pytest.mark.parametrize("limit", [1, 2])
def test_at_most_so_many_checkpoints_are_kept_and_they_are_the_newest(
    tmp_path: Path, images: Split, held_out: Split, limit: int
) -> None:
    everything(tmp_path, images, held_out, checkpointing_steps=1, checkpoints_total_limit=limit)
    kept = sorted(path.name for path in (tmp_path / "work").glob("checkpoint-*"))
    assert kept == [f"checkpoint-{step:08d}" for step in range(5 - limit, 5)]


def test_another_thread_count_is_told_at_the_resume(
    tmp_path: Path, images: Split, held_out: Split, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError):
        everything(tmp_path, images, held_out, combine=Stopping(13))
    torch.set_num_threads(2)
    try:
        everything(tmp_path, images, held_out)
    finally:
        torch.set_num_threads(1)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["resumed with threads 2 instead of 1: the result may differ in the last bits"]


def test_the_same_environment_gives_no_warning(
    tmp_path: Path, images: Split, held_out: Split, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError):
        everything(tmp_path, images, held_out, combine=Stopping(13))
    everything(tmp_path, images, held_out)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- teacher and base ---------------------------------------------------------------------------------------------


def test_the_teacher_and_the_base_stay_as_they_were(
    tmp_path: Path, images: Split, held_out: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = make_pico_denoiser()
    before, teachers, taught = state_digest(denoiser.module.state_dict()), [], denoiser.teacher

    @contextmanager
    def watched(dtype: torch.dtype | None) -> Iterator[nn.Module]:
        with taught(dtype) as teacher:
            teachers.append(teacher)
            yield teacher

    monkeypatch.setattr(denoiser, "teacher", watched)
    preview = {"preview": lambda module, path: None, "validation": measure(denoiser, held_out)}
    train(denoiser, images, job(), tmp_path, runtime=runtime(preview_steps=1), **preview)
    assert state_digest(teachers[0].state_dict()) == before
    assert not teachers[0].training
    assert not any(parameter.requires_grad for parameter in teachers[0].parameters())
    assert state_digest(denoiser.module.state_dict()) == before
    assert not any(module._forward_hooks for module in denoiser.module.modules())
    assert state_digest(component(tmp_path)) != before


def test_a_teacher_whose_weights_were_changed_is_noticed(pico_denoiser: DDPM) -> None:
    with pytest.raises(AssertionError, match="teacher"), pico_denoiser.teacher() as teacher:
        next(teacher.parameters()).data.add_(1)


def test_without_consistency_loss_no_teacher_is_made(
    tmp_path: Path, images: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = make_pico_denoiser()
    monkeypatch.setattr(denoiser, "teacher", lambda dtype: pytest.fail("a teacher was made"))
    train(denoiser, images, job(consistency_weight=0.0, steps=1), tmp_path, runtime=runtime())
    assert read_jsonl(tmp_path / "loss.jsonl")[0]["consistency"] == 0


@pytest.mark.parametrize("use_ema", [True, False])
def test_at_a_learning_rate_of_zero_the_expert_is_the_base_to_the_bit(
    tmp_path: Path, images: Split, use_ema: bool
) -> None:
    denoiser = make_pico_denoiser()
    train(denoiser, images, job(learning_rate=0.0, use_ema=use_ema), tmp_path, runtime=runtime())
    assert state_digest(component(tmp_path)) == state_digest(denoiser.module.state_dict())
    assert not any(matrix.any() for matrix in load_state(tmp_path / "unet" / MATRICES).values())
    assert max(record["consistency"] for record in read_jsonl(tmp_path / "loss.jsonl")) < 1e-10


def test_the_consistency_loss_grows_as_the_expert_leaves_the_teacher(tmp_path: Path, images: Split) -> None:
    train(make_pico_denoiser(), images, job(), tmp_path, runtime=runtime())
    first, *later = [record["consistency"] for record in read_jsonl(tmp_path / "loss.jsonl")]
    assert first < 1e-10 < 1e-6 < min(later)  # kernels with and without gradients may round unlike


# --- what is left -------------------------------------------------------------------------------------------------


def test_the_result_is_a_stock_component_with_the_raw_weights_beside(tmp_path: Path, images: Split) -> None:
    denoiser = make_pico_denoiser()
    results = train(denoiser, images, job(), tmp_path, runtime=runtime())
    assert results["weights"] == "ema"
    assert results["kept_step"] == 4
    kept, raw = component(tmp_path), load_state(tmp_path / "raw" / WEIGHTS_NAME)
    stock = denoiser.module.state_dict()
    assert kept.keys() == raw.keys() == stock.keys()
    assert state_digest(kept) != state_digest(raw)
    assert load_state(tmp_path / "unet" / MATRICES).keys() == load_state(tmp_path / "raw" / MATRICES).keys()
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["_class_name"] == "UNet2DModel"
    assert state_digest(denoiser.component_from(tmp_path).state_dict()) == state_digest(kept)


def test_without_ema_and_projection_only_the_raw_weights_are_left(tmp_path: Path, images: Split) -> None:
    results = train(
        make_pico_denoiser(), images, job(use_ema=False, projection="none"), tmp_path, runtime=runtime()
    )  # fmt: skip
    assert results["weights"] == "raw"
    assert not (tmp_path / "raw").exists()
    assert not (tmp_path / "unet" / MATRICES).exists()


def test_losses_are_written_by_range(tmp_path: Path, images: Split, held_out: Split) -> None:
    denoiser, everywhere = make_pico_denoiser(), whole(T)
    base = job(subset=everywhere, consistency_weight=0.0, projection="none", train_batch_size=32, steps=2)
    train(denoiser, images, base, tmp_path, runtime=runtime(), validation=measure(denoiser, held_out, everywhere))
    quarters = {"[0,5)", "[5,10)", "[10,15)", "[15,20)"}
    assert set(read_jsonl(tmp_path / "loss.jsonl")[0]["ranges"]) == quarters
    (validation,) = read_jsonl(tmp_path / "validation.jsonl")
    assert set(validation["ranges"]) == quarters
    assert validation["own"] == validation["validation"]
    assert validation["own"] == pytest.approx(sum(validation["ranges"].values()) / 4)


def test_what_overflowed_is_null_in_the_journal(tmp_path: Path) -> None:
    """JSON has neither infinity nor NaN."""
    wrong, right = torch.tensor([math.inf, 1.0]), torch.tensor([0.5, 0.5])
    with Journal(tmp_path, ["[0,10)", "[10,20)"], after=0) as journal:
        journal.step(1, [StepLosses(wrong, wrong, right, torch.tensor([0, 1]))], 1e-3, math.nan)
        journal.validation(1, [math.nan, 2.0], math.nan, 2.0)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    lines = [(tmp_path / name).read_text() for name in ("loss.jsonl", "validation.jsonl")]
    loss, validation = (json.loads(line, parse_constant=refuse) for line in lines)
    assert loss == {"step": 1, "loss": None, "denoising": None, "consistency": 0.5, "learning_rate": 1e-3,
                    "gradient_norm": None, "ranges": {"[0,10)": None, "[10,20)": 1.0}}  # fmt: skip
    assert validation == {"step": 1, "validation": None, "own": 2.0, "ranges": {"[0,10)": None, "[10,20)": 2.0}}


# --- waiting for batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers, remedy", [(0, "dataloader_num_workers=1 or more"), (2, "num_workers (now 2)")])
def test_waiting_for_batches_is_counted_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int, remedy: str
) -> None:
    now = [100.0]
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: now[0])

    def slow() -> Iterator[list[Any]]:
        for _ in range(5):
            now[0] += 10.0
            yield []

    batches = Waited("expert 0", workers)
    for number, _ in enumerate(batches.over(slow())):
        now[0] += 30.0
        batches.tell()
        assert bool(caplog.messages) == (number > 0)  # the first 60 s are not judged
    assert batches.share == pytest.approx(40 / 190)  # four waits: not that for the first batch
    (line,) = caplog.messages
    assert line.startswith("expert 0: 14% of the time is spent waiting for batches; ") and remedy in line


def test_a_training_says_how_much_it_waited(
    tmp_path: Path, images: Split, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert 0 < train(make_pico_denoiser(), images, job(), tmp_path / "short", runtime=runtime())["waiting"] < 1
    assert not [line for line in caplog.messages if "waiting for batches" in line]
    monkeypatch.setattr(waiting, "SETTLED", 0.0)
    monkeypatch.setattr(waiting, "MOST", 0.0)
    train(make_pico_denoiser(), images, job(), tmp_path / "long", runtime=runtime(logging_steps=1))
    assert len([line for line in caplog.messages if "waiting for batches" in line]) == 1


def test_loader_workers_end_with_an_error_that_is_still_held(tmp_path: Path, images: Split) -> None:
    """Or a program that fails would wait for them at its end: they leave signals to their parent."""

    def failing(losses: dict[int, torch.Tensor]) -> torch.Tensor:
        assert len(multiprocessing.active_children()) == 2
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as held:
        train(make_pico_denoiser(), images, job(), tmp_path, runtime=runtime(dataloader_num_workers=2), combine=failing)
    assert held.tb and not multiprocessing.active_children()


def test_an_expert_validates_by_its_own_timesteps(tmp_path: Path, images: Split, held_out: Split) -> None:
    denoiser = make_pico_denoiser()
    train(denoiser, images, job(), tmp_path, runtime=runtime(), validation=measure(denoiser, held_out))
    for record in read_jsonl(tmp_path / "validation.jsonl"):
        assert record["own"] == record["ranges"]["[0,10)"] != record["validation"]
        assert record["validation"] == pytest.approx((record["own"] + record["ranges"]["[10,20)"]) / 2)


def validated(folder: Path, denoiser: DDPM, held_out: Split) -> float:
    """The loss of the kept weights on the expert's own timesteps."""
    module = fold_into(denoiser.component_from(folder), folder / "unet")
    return measure(denoiser, held_out).losses(module)[0]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_or_the_last_weights_are_kept(tmp_path: Path, images: Split, held_out: Split, keep: str) -> None:
    denoiser = make_pico_denoiser()
    expert = job(keep=keep, steps=6, validation_steps=1, learning_rate=0.3)  # too high, so that losses go up
    validation = measure(denoiser, held_out)
    results = train(denoiser, images, expert, tmp_path, runtime=runtime(), validation=validation)
    losses = [record["own"] for record in read_jsonl(tmp_path / "validation.jsonl")]
    best = losses.index(min(losses)) + 1
    assert best < 6  # or the test tells nothing
    assert results["kept_step"] == (best if keep == "best" else 6)
    assert results["best_validation"] == min(losses)
    assert validated(tmp_path, denoiser, held_out) == pytest.approx(losses[results["kept_step"] - 1], rel=1e-4)


def test_training_stops_early_after_so_many_validations_without_a_better_loss(
    tmp_path: Path, images: Split, held_out: Split
) -> None:
    denoiser = make_pico_denoiser()
    expert = job(steps=50, learning_rate=0.0, early_stopping=2, validation_steps=3, use_ema=False)
    validation = measure(denoiser, held_out)
    results = train(denoiser, images, expert, tmp_path, runtime=runtime(), validation=validation)
    assert results["steps"] == 9  # the first validation is the best, two more are not better
    assert len(read_jsonl(tmp_path / "loss.jsonl")) == 9
    again = train(denoiser, images, expert, tmp_path, runtime=runtime(), validation=validation)
    assert again["steps"] == 9


def test_early_stopping_is_off_at_zero(tmp_path: Path, images: Split, held_out: Split) -> None:
    denoiser = make_pico_denoiser()
    expert = job(steps=8, learning_rate=0.0, early_stopping=0, validation_steps=1, use_ema=False)
    validation = measure(denoiser, held_out)
    assert train(denoiser, images, expert, tmp_path, runtime=runtime(), validation=validation)["steps"] == 8


def test_previews_see_the_averaged_weights_and_disturb_nothing(tmp_path: Path, images: Split) -> None:
    seen: dict[str, Any] = {}

    def preview(module: nn.Module, path: Path) -> None:
        assert not module.training
        torch.manual_seed(99)
        torch.rand(3)
        seen[path.name] = [parameter.detach().clone() for parameter in module.parameters()]

    options: dict[str, Any] = {"runtime": runtime(preview_steps=2, checkpointing_steps=1)}
    train(make_pico_denoiser(dropout=0.1), images, job(), tmp_path / "with", preview=preview, **options)
    train(make_pico_denoiser(dropout=0.1), images, job(), tmp_path / "without", **options)
    assert tensors(tmp_path / "with") == tensors(tmp_path / "without")
    assert list(seen) == ["00000002.png", "00000004.png"]
    state = load_state(tmp_path / "with" / "work" / "checkpoint-00000002" / "state.safetensors")
    assert all(torch.equal(value, state[f"ema/{i}"]) for i, value in enumerate(seen["00000002.png"]))
    raw = [value for key, value in state.items() if key.startswith("model/component.")]
    assert len(raw) == len(seen["00000002.png"])
    assert state_digest({str(i): v for i, v in enumerate(seen["00000002.png"])}) != state_digest(
        {str(i): v for i, v in enumerate(raw)}
    )


# --- EMA ----------------------------------------------------------------------------------------------------------


def ema_of(value: float) -> tuple[nn.Parameter, Ema]:
    """A parameter at `value` whose average stands at 1."""
    parameter = nn.Parameter(torch.ones(3))
    ema = Ema([parameter], DecoupleSettings())
    parameter.data.fill_(value)
    return parameter, ema


def test_averaged_weights_are_seen_inside_the_context_only() -> None:
    parameter, ema = ema_of(2.0)
    with ema.weights():
        assert parameter.tolist() == [1, 1, 1]
    assert parameter.tolist() == [2, 2, 2]


def test_raw_weights_are_back_to_the_bit_after_an_exception() -> None:
    parameter, ema = ema_of(0.1)
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError), ema.weights():
        raise RuntimeError
    assert torch.equal(parameter, before)


def test_the_average_follows_the_warm_up_of_its_decay() -> None:
    parameter, ema = ema_of(0.0)
    expected = 1.0
    for step in range(1, 6):
        decay = 0.0 if step == 1 else min(0.9999, 1 - (1 + (step - 1)) ** -0.75)
        expected = decay * expected + (1 - decay) * step
        parameter.data.fill_(step)
        ema.step()
        assert ema.state()["0"].tolist() == pytest.approx([expected] * 3)


def test_a_restored_average_goes_on_as_if_never_interrupted() -> None:
    one, two = ema_of(0.0), ema_of(0.0)
    for value in range(4):
        one[0].data.fill_(value)
        one[1].step()
    two[1].restore({key: tensor.clone() for key, tensor in one[1].state().items()}, 4)
    for parameter, ema in (one, two):
        parameter.data.fill_(7)
        ema.step()
    assert torch.equal(one[1].state()["0"], two[1].state()["0"])


# --- numbers that are not finite ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spoilt(Split):
    """A split whose second image of the third batch is not finite."""

    calls: list[int] = field(default_factory=list)

    def images(self, positions: list[int]) -> torch.Tensor:
        images = super().images(positions)
        self.calls.append(len(positions))
        if len(self.calls) == 3:
            images[1] = float("inf")
        return images


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_checkpoint(
    tmp_path: Path, images: Split
) -> None:
    plain = replace(images, settings=DataSettings())
    spoilt = Spoilt(plain.name, plain.source, plain.indices, plain.settings)
    expert = job(global_prob=0.0)
    with pytest.raises(MachineError) as raised:
        train(make_pico_denoiser(), spoilt, expert, tmp_path, runtime=runtime())
    assert "expert 0: loss nan at step 3 in [0,10); the last checkpoint is kept" in str(raised.value)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["checkpoint-00000002"]
    assert [record["step"] for record in read_jsonl(tmp_path / "loss.jsonl")] == [1, 2]

    train(make_pico_denoiser(), plain, expert, tmp_path, runtime=runtime())  # with the images mended
    train(make_pico_denoiser(), plain, expert, tmp_path / "whole", runtime=runtime())
    assert state_digest(component(tmp_path)) == state_digest(component(tmp_path / "whole"))


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path, images: Split) -> None:
    def overflowing(losses: dict[int, torch.Tensor]) -> torch.Tensor:
        return total(losses) * float("inf")

    with pytest.raises(MachineError, match=r"gradient norm (nan|inf) at step 1 with a finite loss"):
        train(make_pico_denoiser(), images, job(), tmp_path, runtime=runtime(), combine=overflowing)


class FakeAccelerator:
    """One with a GradScaler, whose gradients overflowed."""

    scaler = object()


class FakeOptimizer:
    """Skips the updates of the given numbers, as accelerate's does at an overflow."""

    def __init__(self, skipping: set[int]) -> None:
        self.skipping, self.steps = skipping, 0

    def step(self) -> None:
        self.steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    @property
    def step_was_skipped(self) -> bool:
        return self.steps in self.skipping


def updates(skipping: set[int], count: int) -> Progress:
    """So many updates under a GradScaler."""
    optimizer, progress = FakeOptimizer(skipping), Progress()
    losses = [StepLosses(*(torch.tensor([float("inf")]) for _ in range(3)), torch.tensor([0]))]
    for _ in range(count):
        _update(FakeAccelerator(), optimizer, losses, math.inf, job(), progress, ["[0,10)"])  # type: ignore[arg-type]
        progress.step += 1
    return progress


def test_fp16_is_refused_where_it_would_quietly_be_fp32(tmp_path: Path, images: Split) -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        train(make_pico_denoiser(), images, job(mixed_precision="fp16"), tmp_path, runtime=runtime())


def test_under_a_grad_scaler_an_overflow_skips_the_update_and_is_no_error() -> None:
    progress = updates({2, 3}, 5)
    assert progress.updates == 3
    assert progress.skipped_in_a_row == 0
    assert updates({2, 3}, 3).skipped_in_a_row == 2


def test_twenty_overflows_in_a_row_stop_and_an_update_between_them_starts_the_count_again() -> None:
    assert MOST_SKIPPED == 20
    assert updates(set(range(1, 20)) | set(range(21, 40)), 39).updates == 1
    with pytest.raises(MachineError, match=r"20 updates in a row overflowed in fp16, the last at step 20; .*bf16"):
        updates(set(range(1, 21)), 20)


def test_a_skipped_update_does_not_move_the_average(
    tmp_path: Path, images: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skipping(accelerator: Any, optimizer: Any, *rest: Any) -> None:
        progress = rest[3]
        if progress.step < 2:
            _update(accelerator, optimizer, *rest)
            return
        optimizer.zero_grad()
        progress.skipped_in_a_row += 1

    monkeypatch.setattr("deme_diffusion.decoupling.train._update", skipping)
    results = train(make_pico_denoiser(), images, job(steps=3), tmp_path, runtime=runtime(checkpointing_steps=1))
    assert (results["steps"], results["updates"]) == (3, 2)
    second, third = (tmp_path / "work" / f"checkpoint-{step:08d}" / "state.safetensors" for step in (2, 3))
    assert second.read_bytes() == third.read_bytes()


# --- optimisation -------------------------------------------------------------------------------------------------


def test_accumulating_two_batches_equals_one_batch_of_twice_the_size(tmp_path: Path, images: Split) -> None:
    # A large epsilon makes Adam smooth, so that rounding is not blown up where gradients vanish.
    once = job(train_batch_size=4, adam_epsilon=0.1)
    twice = job(train_batch_size=2, gradient_accumulation_steps=2, adam_epsilon=0.1)
    for name, expert in (("once", once), ("twice", twice)):
        train(make_pico_denoiser(), images, expert, tmp_path / name, runtime=runtime())
    one, two = (component(tmp_path / name) for name in ("once", "twice"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-6)
    records = [read_jsonl(tmp_path / name / "loss.jsonl") for name in ("once", "twice")]
    for a, b in zip(*records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
    assert state_digest(one) != state_digest(make_pico_denoiser().module.state_dict())


@pytest.mark.parametrize(
    "lr_scheduler, expected",
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [0, 1 / 2, 1, 1, 1, 1]),
        ("linear", [0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", [0, 1 / 2, 1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_learning_rates_follow_the_schedule(
    tmp_path: Path, images: Split, lr_scheduler: str, expected: list[float]
) -> None:
    warmup = 0 if lr_scheduler == "constant" else 2
    expert = job(steps=6, lr_scheduler=lr_scheduler, lr_warmup_steps=warmup, learning_rate=2e-3)
    train(make_pico_denoiser(), images, expert, tmp_path, runtime=runtime())
    rates = [record["learning_rate"] for record in read_jsonl(tmp_path / "loss.jsonl")]
    assert rates == pytest.approx([2e-3 * factor for factor in expected])


def test_the_rate_that_is_written_is_the_rate_that_is_used(tmp_path: Path, images: Split) -> None:
    """A warm-up from 0 leaves the weights alone in the first step, and not in the second."""
    expert = job(steps=2, lr_scheduler="constant_with_warmup", lr_warmup_steps=2, use_ema=False)
    train(make_pico_denoiser(), images, expert, tmp_path, runtime=runtime(checkpointing_steps=1))
    states = [load_state(tmp_path / "work" / f"checkpoint-{s:08d}" / "state.safetensors") for s in (1, 2)]
    base = make_pico_denoiser().module.state_dict()
    assert all(torch.equal(states[0][f"model/component.{key}"], value) for key, value in base.items())
    assert not all(torch.equal(states[1][f"model/component.{key}"], value) for key, value in base.items())


def test_gradients_are_clipped_to_the_norm(tmp_path: Path, images: Split) -> None:
    for name, most in (("tight", 1e-6), ("loose", 1e6)):
        expert = job(max_grad_norm=most, adam_epsilon=1.0, use_ema=False, steps=1, projection="none")
        train(make_pico_denoiser(), images, expert, tmp_path / name, runtime=runtime())
    base = make_pico_denoiser().module.state_dict()
    moved = {n: max(float((v - base[k]).abs().max()) for k, v in component(tmp_path / n).items())
             for n in ("tight", "loose")}  # fmt: skip
    assert moved["tight"] < 1e-7 < 1e-5 < moved["loose"]
    norms = {read_jsonl(tmp_path / name / "loss.jsonl")[0]["gradient_norm"] for name in moved}
    assert len(norms) == 1  # what is written is the norm before clipping


def test_bf16_trains_float32_master_weights(tmp_path: Path, images: Split, held_out: Split) -> None:
    denoiser = make_pico_denoiser()
    options: dict[str, Any] = {"runtime": runtime(), "validation": measure(denoiser, held_out)}
    train(denoiser, images, job(mixed_precision="bf16", steps=20), tmp_path / "bf16", **options)
    train(denoiser, images, job(steps=20), tmp_path / "no", **options)
    state = load_state(tmp_path / "bf16" / "work" / "checkpoint-00000020" / "state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    half, full = (component(tmp_path / name) for name in ("bf16", "no"))
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    assert state_digest(half) != state_digest(full)
    losses = [record["own"] for record in read_jsonl(tmp_path / "bf16" / "validation.jsonl")]
    assert losses[-1] < losses[0]


def test_another_seed_is_another_training(tmp_path: Path, images: Split) -> None:
    for seed in (5, 6):
        train(make_pico_denoiser(), images, job(seed=seed, steps=1, use_ema=False), tmp_path / str(seed),
              runtime=runtime())  # fmt: skip
    assert state_digest(component(tmp_path / "5")) != state_digest(component(tmp_path / "6"))


def test_dropout_is_drawn_anew_in_every_micro_batch(tmp_path: Path, images: Split) -> None:
    for name, dropout in (("without", 0.0), ("with", 0.5)):
        train(make_pico_denoiser(dropout=dropout), images, job(learning_rate=0.0), tmp_path / name, runtime=runtime())
    consistency = [record["consistency"] for record in read_jsonl(tmp_path / "with" / "loss.jsonl")]
    assert len(set(consistency)) == 4  # the teacher has none, so it differs from a student of the same weights
    assert min(consistency) > 0
