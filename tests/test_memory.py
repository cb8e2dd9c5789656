"""The estimate of a training's memory against what torch counts, and the refusal before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_pico_denoiser
from deme_diffusion.config import DataSettings, DecoupleSettings, PretrainSettings, RuntimeSettings
from deme_diffusion.data.splits import Split, load_splits
from deme_diffusion.decoupling import memory
from deme_diffusion.decoupling.memory import Breakdown, estimate, free_memory
from deme_diffusion.decoupling.step import Job
from deme_diffusion.decoupling.switches import checkpoint_gradients
from deme_diffusion.decoupling.train import train
from deme_diffusion.errors import UserError
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.projection import Projected
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.recipes import load

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits_model() -> DDPM:
    """The packaged digits model."""
    base = Graph(load("digits").recipe, download=False).base
    assert isinstance(base, Input)
    return DDPM.load(base.folder)


def job(batch: int = 32, *, weight: float = 1.0, projection: str = "residual", **options: Any) -> Job:
    teacher = {key: options.pop(key) for key in ("teacher", "teacher_dtype") if key in options}
    settings = DecoupleSettings(train_batch_size=batch, **options)
    return Job("expert 0", settings, [[0, 10]], 4, 1e-3, 0, 0.3, weight, projection, **teacher)


def reckoned(denoiser: DDPM, expert: Job, device: torch.device = CPU, **runtime: Any) -> Breakdown:
    return estimate(denoiser, expert, RuntimeSettings(**runtime), device)


def peak_of_a_step(denoiser: DDPM, expert: Job, *, checkpointing: bool = False) -> int:
    """Most bytes that torch's profiler sees allocated at once, from the student's copy to the second update."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        student = Projected(denoiser.student(), expert.projection).train()
        if checkpointing:
            checkpoint_gradients(student.component)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
        average = [parameter.detach().clone() for parameter in student.parameters()]
        x, t = torch.randn(expert.settings.train_batch_size, *denoiser.sample_shape), torch.tensor(3)
        for _ in range(2):
            (denoiser.predict(student, x, t.expand(len(x)), {}) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        del average
    held = peak = 0
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_within_a_quarter_of_what_a_step_takes(digits_model: DDPM, checkpointing: bool) -> None:
    expert = job(64)
    needed = reckoned(digits_model, expert, gradient_checkpointing=checkpointing)
    measured = peak_of_a_step(digits_model, expert, checkpointing=checkpointing)
    assert 0.75 < (sum(needed.values()) - needed["base"]) / measured < 1.25


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("kind", ["DownBlock2D", "AttnDownBlock2D"])
def test_checkpointing_is_reckoned_by_what_diffusers_computes_anew(layers: int, kind: str) -> None:
    """A residual block at a time, however many a block has; never an attention."""
    up = kind.replace("Down", "Up")
    unet = {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": layers,
            "down_block_types": ("DownBlock2D", kind), "up_block_types": (up, "UpBlock2D")}  # fmt: skip
    denoiser = DDPM.from_scratch(PretrainSettings.model_validate({"unet": unet}), out_seed=0)
    needed = reckoned(denoiser, job(16), gradient_checkpointing=True)
    measured = peak_of_a_step(denoiser, job(16), checkpointing=True)
    assert 0.85 < (sum(needed.values()) - needed["base"]) / measured < 1.15


def test_the_doctor_reckons_as_the_check_before_a_training(pico_values: dict[str, Any], tmp_path: Path) -> None:
    from deme_diffusion.doctor.needs import training_memory
    from deme_diffusion.pipeline.run import open_run
    from deme_diffusion.pipeline.stages import job_of
    from deme_diffusion.recipes import Loaded
    from deme_diffusion.recipes.checks import parse

    run = open_run(Loaded(parse(pico_values, where="pico"), {}), out=tmp_path / "run", download=False)
    needed = reckoned(make_pico_denoiser(), job_of(run.recipe, run.graph.experts[0][0]))
    assert training_memory(run, CPU) == sum(needed.values())
    assert training_memory(run, torch.device("cuda")) is not None  # where there is none, too

    pretrain = {"unet": {"block_out_channels": (8, 16)}, "scheduler": {"num_train_timesteps": 20}}
    values = {**pico_values, "model": {"pretrained": None}, "pretrain": pretrain}
    larger = open_run(Loaded(parse(values, where="pico"), {}), out=tmp_path / "other", download=False)
    assert (training_memory(larger, CPU) or 0) > sum(needed.values())


def test_activations_grow_with_the_batch_and_shrink_by_checkpointing_and_half_precision(digits_model: DDPM) -> None:
    activations = {batch: reckoned(digits_model, job(batch))["activations"] for batch in (16, 32)}
    assert activations[32] / activations[16] == pytest.approx(2, rel=0.05)
    assert reckoned(digits_model, job(32), gradient_checkpointing=True)["activations"] < 0.8 * activations[32]
    assert reckoned(digits_model, job(32, mixed_precision="bf16"))["activations"] < 0.6 * activations[32]


def test_on_a_gpu_half_precision_leaves_the_norms_and_what_follows_them_wide(digits_model: DDPM) -> None:
    half = job(mixed_precision="bf16")
    cpu, gpu = (reckoned(digits_model, half, torch.device(name))["activations"] for name in ("cpu", "cuda"))
    assert cpu < 0.75 * gpu < gpu < reckoned(digits_model, job())["activations"]


def test_each_setting_counts_for_what_it_holds(digits_model: DDPM) -> None:
    module = digits_model.module
    base = sum(p.numel() for p in module.parameters()) * 4
    plain = reckoned(digits_model, job())
    weights = plain["weights"]
    assert plain["base"] == base < weights  # the projections
    copies = {"gradients": weights, "optimizer": 2 * weights, "ema": weights, "teacher": 0}
    assert {kind: plain[kind] for kind in copies} == copies
    assert reckoned(digits_model, job(projection="none"))["weights"] == base
    assert reckoned(digits_model, job(use_ema=False))["ema"] == 0
    assert reckoned(digits_model, job(use_8bit_adam=True))["optimizer"] == weights // 2
    assert reckoned(digits_model, job(teacher="ema"))["teacher"] == weights
    assert reckoned(digits_model, job(teacher="ema", teacher_dtype="bfloat16"))["teacher"] == weights // 2
    assert reckoned(digits_model, job(teacher_dtype="bfloat16"))["teacher"] == base // 2
    assert reckoned(digits_model, job(teacher="ema", weight=0.0))["teacher"] == 0
    assert estimate(digits_model, job(), RuntimeSettings(), CPU, processes=2)["gradients"] == 2 * weights
    assert reckoned(digits_model, job(), torch.device("cuda"), offload_ema=True)["ema"] == 0  # it is on the CPU


def test_the_estimate_changes_neither_the_model_nor_the_random_numbers(digits_model: DDPM) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    reckoned(digits_model, job(), gradient_checkpointing=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(type(p) is torch.nn.Parameter for p in digits_model.module.parameters())
    assert type(digits_model.scheduler.alphas_cumprod) is torch.Tensor


# --- the refusal --------------------------------------------------------------------------------------------------


def test_too_little_memory_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: Split = load_splits(DataSettings())["train"]
    monkeypatch.setattr(memory, "free_memory", lambda device: 300_000)
    with pytest.raises(UserError) as refused:
        train(make_pico_denoiser(), images, job(64), tmp_path, runtime=RuntimeSettings(device="cpu"))
    line = str(refused.value)
    assert line.startswith("expert 0: training needs about 0.0")
    assert "activations 0.00" in line
    assert "but 0.0003 GB is free" in line
    assert "lower train_batch_size=64 (raising gradient_accumulation_steps as much)" in line
    assert "or set runtime.gradient_checkpointing=true" in line
    assert "\n" not in line
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(memory, "free_memory", lambda device: 10**9)
    train(make_pico_denoiser(), images, job(4), tmp_path, runtime=RuntimeSettings(device="cpu"))


def test_where_the_system_does_not_say_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    memory.check_memory(make_pico_denoiser(), job(), RuntimeSettings(), CPU)


def test_advice_names_only_what_is_left_to_change() -> None:
    settings = RuntimeSettings(gradient_checkpointing=True, offload_ema=True)
    gpu = torch.device("cuda")
    assert memory._advice(job(8), settings, gpu).endswith("as much), or set teacher_dtype=bfloat16")
    assert memory._advice(job(8, teacher_dtype="bfloat16"), settings, gpu).endswith("as much)")
    every = "or set runtime.gradient_checkpointing=true, runtime.offload_ema=true, teacher_dtype=bfloat16"
    assert memory._advice(job(8), RuntimeSettings(), gpu).endswith(every)
    assert memory._advice(job(8), RuntimeSettings(), CPU).endswith("or set runtime.gradient_checkpointing=true")


def test_free_memory_is_the_smaller_of_machine_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, group, expected in ((5, 3, 3), (5, None, 5), (None, 4, 4), (None, None, None)):
        monkeypatch.setattr(memory, "_available", lambda machine=machine: machine)
        monkeypatch.setattr(memory, "_left_in_group", lambda group=group: group)
        assert free_memory(CPU) == expected


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_this_machine_says_how_much_is_free() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    free = free_memory(CPU)
    assert free is not None
    assert 0 < free <= int(total.split()[1]) * 1024
