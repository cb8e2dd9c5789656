"""Runtime settings that change no result but its last bits, and leave torch's global switches as they were."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from conftest import make_pico_denoiser
from deme_diffusion.config import DataSettings, DecoupleSettings, RuntimeSettings
from deme_diffusion.data.splits import Split, load_splits
from deme_diffusion.decoupling.checkpoint import flatten_optimizer, restore_optimizer
from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.setup import make_optimizer
from deme_diffusion.decoupling.step import Job
from deme_diffusion.decoupling.switches import (
    SCALES,
    check_compiled,
    checkpoint_gradients,
    forget_compiled,
    gradients,
    laid_out,
    switched,
)
from deme_diffusion.decoupling.train import train
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.evaluation.extractors.classifier import quarter_means
from deme_diffusion.files import read_jsonl
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.projection import Projected
from deme_diffusion.pipeline.engine import run_stages
from deme_diffusion.weights import WEIGHTS_NAME, State, load_state, state_digest


@pytest.fixture(scope="module")
def images() -> Split:
    return load_splits(DataSettings())["train"]


def job(steps: int = 4, **options: Any) -> Job:
    """An expert with all techniques on."""
    settings = DecoupleSettings(**{"train_batch_size": 4, "adam_epsilon": 0.01, **options})
    return Job("expert 0", settings, [[0, 10]], steps, 1e-2, 5, 0.3, 1.0, "residual")


def trained(images: Split, folder: Path, expert: Job | None = None, *, dropout: float = 0.0, **options: Any) -> State:
    """The kept weights of a training under some runtime settings."""
    runtime = RuntimeSettings(**{"device": "cpu", "checkpointing_steps": 2, **options})
    train(make_pico_denoiser(dropout=dropout), images, expert or job(), folder, runtime=runtime)
    return load_state(folder / "unet" / WEIGHTS_NAME)


def assert_close(one: State, two: State) -> None:
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5)


# --- global switches ----------------------------------------------------------------------------------------------


def switches() -> tuple[bool, ...]:
    """torch's switches as they stand."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    strict = torch.are_deterministic_algorithms_enabled()
    return (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32, strict)


@pytest.mark.parametrize(
    "options, tf32, expected",
    [
        ({}, None, (True, False, True, False, False)),
        ({}, False, (True, False, False, False, False)),
        ({"deterministic": True}, None, (False, True, True, False, True)),
        ({}, True, (True, False, True, True, False)),
    ],
)
def test_switches_are_set_inside_and_as_before_outside(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], tf32: bool | None, expected: tuple[bool, ...]
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = switches()
    with pytest.raises(ZeroDivisionError), switched(RuntimeSettings(**options), allow_tf32=tf32):
        assert switches() == expected
        raise ZeroDivisionError
    assert switches() == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own


def precisions() -> list[str]:
    """By torch's newer names."""
    cudnn = torch.backends.cudnn
    parts: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
    return [part.fp32_precision for part in parts]


def _set_precisions(values: list[str]) -> None:
    cudnn = torch.backends.cudnn
    parts: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
    for part, value in zip(parts, values, strict=True):
        part.fp32_precision = value


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has only flags")
@pytest.mark.parametrize("tf32, inside", [(None, None), (True, ["tf32"] * 3), (False, ["ieee"] * 3)])
@pytest.mark.parametrize("name", ["cuda.matmul", "cudnn.conv", "cudnn.rnn", ""])
@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_switches_by_their_newer_names_are_obeyed_and_as_before_outside(
    name: str, value: str, tf32: bool | None, inside: list[str] | None
) -> None:
    """Torch raises where a flag is read that contradicts a precision."""
    owner: Any = torch.backends
    for part in filter(None, name.split(".")):
        owner = getattr(owner, part)
    defaults, own = precisions(), owner.fp32_precision
    owner.fp32_precision = value
    try:
        before = precisions()
        with switched(RuntimeSettings(), allow_tf32=tf32):
            assert precisions() == (inside or before)
        assert precisions() == before
    finally:
        owner.fp32_precision = own
        _set_precisions(defaults)


def test_a_training_sees_them_and_leaves_none(tmp_path: Path, images: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before, inside = switches(), list[tuple[bool, ...]]()

    def noting(losses: dict[int, torch.Tensor]) -> torch.Tensor:
        inside.append(switches())
        return torch.stack(list(losses.values())).sum()

    runtime = RuntimeSettings(device="cpu", deterministic=True)
    train(make_pico_denoiser(), images, job(1, allow_tf32=True), tmp_path, runtime=runtime, combine=noting)
    assert inside == [(False, True, True, True, True)]
    assert switches() == before


def test_deterministic_changes_no_bit_on_the_cpu(tmp_path: Path, images: Split) -> None:
    plain, strict = (trained(images, tmp_path / str(on), deterministic=on) for on in (False, True))
    assert state_digest(plain) == state_digest(strict)


@pytest.mark.parametrize("size", [(1, 1), (2, 4), (7, 8), (5, 3)])
def test_pooling_whose_gradient_is_deterministic_pools_the_same(size: tuple[int, int]) -> None:
    hidden = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quarter_means(hidden), nn.functional.adaptive_avg_pool2d(hidden, 2))


def test_cublas_is_told_before_any_stage_is_made(
    tmp_path: Path, pico_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deme_diffusion.artefacts import Store
    from deme_diffusion.pipeline.graph import Graph

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    runtime = pico_recipe.runtime.model_copy(update={"deterministic": True})
    graph = Graph(pico_recipe.model_copy(update={"runtime": runtime}), download=True)
    run_stages(graph, Store(tmp_path), [], finished=lambda *_: None)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# --- memory format, compilation -----------------------------------------------------------------------------------


def test_channels_last_trains_the_same_and_resumes_to_the_bit(tmp_path: Path, images: Split) -> None:
    whole = trained(images, tmp_path / "whole", channels_last=True)
    assert_close(whole, trained(images, tmp_path / "plain"))

    trained(images, tmp_path / "parts", job(2), channels_last=True)
    assert state_digest(trained(images, tmp_path / "parts", job(4), channels_last=True)) == state_digest(whole)


def test_channels_last_stays_out_of_files() -> None:
    module = make_pico_denoiser().module
    before = state_digest(module.state_dict())
    laid_out(module, RuntimeSettings(channels_last=True))
    assert any(not p.is_contiguous() for p in module.parameters())
    assert state_digest(module.state_dict()) == before


def test_the_student_the_teacher_and_what_is_sampled_are_compiled(
    tmp_path: Path, images: Split, pico_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deme_diffusion.artefacts import Store
    from deme_diffusion.pipeline.graph import Graph
    from deme_diffusion.pipeline.workbench import Workbench

    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, *_, **__: compiled.append(module))
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # torch's own default
    weights = trained(images, tmp_path / "compiled", compile=True)
    assert len({id(module) for module in compiled}) == 2
    assert weights.keys() == make_pico_denoiser().module.state_dict().keys()
    assert state_digest(weights) == state_digest(trained(images, tmp_path / "plain"))

    runtime = pico_recipe.runtime.model_copy(update={"compile": True})
    graph = Graph(pico_recipe.model_copy(update={"runtime": runtime}), download=True)
    module = Workbench(graph, Store(tmp_path)).component(graph.base)
    assert compiled[-1] is module
    assert not torch._dynamo.config.skip_nnmodule_hook_guards  # type: ignore[comparison-overlap]


class Twofold(nn.Module):
    """A stand-in for compiled code: its answer, forced to be eager, is another one."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.scale, self.factor, self.eager = nn.Parameter(torch.ones(1)), factor, False

    def forward(self, x: torch.Tensor, t: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (x * self.scale * (1.0 if self.eager else self.factor),)


@pytest.mark.parametrize("factor, fits", [(1.0, True), (1.001, True), (1.1, False), (0.0, False), (math.nan, False)])
def test_wrong_gradients_of_compiled_code_are_noticed(
    pico_denoiser: DDPM, monkeypatch: pytest.MonkeyPatch, factor: float, fits: bool
) -> None:
    module = Twofold(factor)

    @contextmanager
    def forced(stance: str) -> Iterator[None]:
        module.eager = stance == "force_eager"
        yield
        module.eager = False

    monkeypatch.setattr(torch.compiler, "set_stance", forced)
    refused = pytest.raises(MachineError, match=r"compiles the model to other gradients \(of scale, .*compile=false")
    with nullcontext() if fits else refused:
        check_compiled(pico_denoiser, module, job().settings)
    assert module.training
    assert module.scale.grad is None or not fits


class Convolutions(nn.Module):
    """A small model with nothing that any torch is known to compile wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, x: torch.Tensor, t: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (self.layers(x),)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_code_that_really_is_compiled_is_compared(pico_denoiser: DDPM, factor: float) -> None:
    """By a compiler that runs what torch captured, right or wrongly."""
    ran: list[int] = []

    def compiler(captured: Any, examples: list[torch.Tensor]) -> Any:
        def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
            ran.append(1)
            return [factor * output for output in captured(*inputs)]

        return run

    forget_compiled()
    module = Convolutions()
    module.compile(backend=compiler)
    with nullcontext() if factor == 1 else pytest.raises(MachineError, match="compiles the model to other gradients"):
        check_compiled(pico_denoiser, module, job().settings)
    assert ran == [1]


def test_a_compiler_that_fails_is_told_in_one_line(pico_denoiser: DDPM) -> None:
    def broken(captured: Any, examples: list[torch.Tensor]) -> Any:
        raise OSError("main.so: file too short\nand much more")

    forget_compiled()
    module = Convolutions()
    module.compile(backend=broken)
    with pytest.raises(MachineError, match=r"does not compile the model \(.*too short\); use runtime.compile=false$"):
        check_compiled(pico_denoiser, module, job().settings)


@pytest.mark.slow
def test_convolutions_are_compiled_rightly_and_accepted(pico_denoiser: DDPM) -> None:
    forget_compiled()
    check_compiled(pico_denoiser, laid_out(Convolutions(), RuntimeSettings(compile=True)), job().settings)
    assert torch._dynamo.utils.counters["frames"]["ok"]  # it did compile


def test_small_gradients_are_compared_in_half_precision_too() -> None:
    """Unscaled they underflow, and a model is not like itself."""
    denoiser = make_pico_denoiser()
    student: Any = denoiser.student()
    student.conv_out.weight.data.mul_(1e-3)
    single, half = job().settings, job(mixed_precision="fp16").settings
    plain, scale = gradients(denoiser, student, single), SCALES[0]
    assert _wrong(gradients(denoiser, student, half), plain)
    assert not _wrong({name: g / scale for name, g in gradients(denoiser, student, half, scale).items()}, plain)
    check_compiled(denoiser, student, half)


def _wrong(found: State, expected: State) -> list[str]:
    """Those that are off by more than a tenth, but for what is 0 up to rounding."""
    most = max(float(gradient.norm()) for name, gradient in expected.items() if not name.startswith("conv_out"))
    return [k for k, g in expected.items() if float((found[k] - g).norm()) > 0.1 * float(g.norm()) + 1e-3 * most]


def test_large_gradients_are_compared_at_a_scale_where_they_are_finite(
    pico_denoiser: DDPM, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[float] = []

    def overflowing(denoiser: Any, student: Any, settings: Any, scale: float = 1.0) -> State:
        scales.append(scale)
        return {"scale": torch.tensor([math.inf if scale > 300 else scale])}

    monkeypatch.setattr("deme_diffusion.decoupling.switches.gradients", overflowing)
    check_compiled(pico_denoiser, Twofold(1.0), job(mixed_precision="fp16").settings)
    assert scales == [2.0**16, 2.0**12, 2.0**8, 2.0**8]


@pytest.mark.slow
def test_a_captured_training_gives_the_same(tmp_path: Path, images: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of compilation but the code that torch generates, which is wrong for upsampling in torch 2.13 on a CPU."""
    captured: list[nn.Module] = []
    compile_with = nn.Module.compile

    def compile_eagerly(module: nn.Module) -> None:
        captured.append(module)
        compile_with(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    plain = trained(images, tmp_path / "plain", job(2))
    assert_close(trained(images, tmp_path / "compiled", job(2), compile=True), plain)
    assert len(captured) == 2  # the student and the teacher
    assert_close(trained(images, tmp_path / "compiled", job(4)), trained(images, tmp_path / "plain", job(4)))


@pytest.mark.slow
def test_a_compiled_training_gives_the_same_or_is_refused(tmp_path: Path, images: Split) -> None:
    """Torch 2.13 on a CPU compiles the pico model's backward pass wrongly; other versions do not."""
    plain = trained(images, tmp_path / "plain", job(2))
    try:
        compiled = trained(images, tmp_path / "compiled", job(2), compile=True)
    except MachineError as error:
        assert "compiles the model to other gradients" in str(error)
        return
    assert_close(compiled, plain)
    assert_close(trained(images, tmp_path / "compiled", job(4)), trained(images, tmp_path / "plain", job(4)))


# --- gradient checkpointing ---------------------------------------------------------------------------------------


def test_checkpointed_gradients_are_the_same_with_dropout_too(tmp_path: Path, images: Split) -> None:
    plain, checkpointed = (
        trained(images, tmp_path / str(on), dropout=0.2, gradient_checkpointing=on) for on in (False, True)
    )
    assert_close(plain, checkpointed)
    norms = [[r["gradient_norm"] for r in read_jsonl(tmp_path / on / "loss.jsonl")] for on in ("False", "True")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_activations_really_are_computed_anew() -> None:
    """A convolution within a block runs twice a step."""
    student = make_pico_denoiser().student().train()
    calls: list[int] = []
    student.get_submodule("down_blocks.0.resnets.0.conv1").register_forward_hook(lambda *_: calls.append(1))
    for times, checkpointing in ((1, False), (2, True)):
        if checkpointing:
            checkpoint_gradients(student)
        calls.clear()
        student(torch.randn(2, 1, 8, 8), torch.tensor([1, 2])).sample.sum().backward()
        assert len(calls) == times


def test_a_model_without_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"runtime\.gradient_checkpointing: a Linear has none"):
        checkpoint_gradients(nn.Linear(2, 2))


# --- the moving average in CPU memory -----------------------------------------------------------------------------


def test_an_offloaded_average_is_the_same_to_the_bit(tmp_path: Path, images: Split) -> None:
    inside, offloaded = (trained(images, tmp_path / str(on), offload_ema=on) for on in (False, True))
    assert state_digest(inside) == state_digest(offloaded)
    trained(images, tmp_path / "parts", job(2), offload_ema=True)
    assert state_digest(trained(images, tmp_path / "parts", job(4), offload_ema=True)) == state_digest(inside)


def test_an_offloaded_average_is_swapped_in_and_out() -> None:
    parameter = nn.Parameter(torch.ones(3))
    ema = Ema([parameter], DecoupleSettings(), offload=True)
    parameter.data.fill_(2)
    with ema.weights():
        assert parameter.tolist() == [1, 1, 1]
    assert parameter.tolist() == [2, 2, 2]
    ema.step()  # the first step follows at once
    with ema.weights():
        assert parameter.tolist() == [2, 2, 2]


# --- 8-bit Adam ---------------------------------------------------------------------------------------------------


def test_8_bit_adam_without_bitsandbytes_names_the_extra(
    tmp_path: Path, images: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"use_8bit_adam needs bitsandbytes: pip install 'deme-diffusion\[8bit\]'"):
        trained(images, tmp_path, job(use_8bit_adam=True))


class Eight(torch.optim.Optimizer):
    """Keeps state as bitsandbytes does: a number of steps, bytes, and one map that all parameters share."""

    map = torch.linspace(-1, 1, 256)

    def __init__(self, parameters: list[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, options)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bytes stay bytes, as in bitsandbytes; torch would give them the parameters' dtype."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.state.update({parameters[i]: entry for i, entry in state["state"].items()})

    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            state["state1"], state["qmap1"] = torch.full(parameter.shape, state["step"], dtype=torch.uint8), self.map
            parameter.data.sub_(0.1)


def fake_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("bitsandbytes")
    module.optim = ModuleType("bitsandbytes.optim")
    module.optim.AdamW8bit = Eight
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)


def test_8_bit_adam_on_a_cpu_is_refused(tmp_path: Path, images: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bitsandbytes(monkeypatch)
    with pytest.raises(UserError, match="use_8bit_adam needs a GPU, and this training runs on the cpu"):
        trained(images, tmp_path, job(use_8bit_adam=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_8_bit_adam_and_channels_last_are_told_to_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, channels_last: bool
) -> None:
    fake_bitsandbytes(monkeypatch)
    student = laid_out(make_pico_denoiser().student(), RuntimeSettings(channels_last=channels_last))
    make_optimizer(list(student.parameters()), job(use_8bit_adam=True), torch.device("cuda"))
    assert [line.split(" (")[0] for line in caplog.messages] == (
        ["expert 0: use_8bit_adam undoes runtime.channels_last in its first step"] if channels_last else []
    )


def test_the_state_of_8_bit_adam_goes_through_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deme_diffusion.weights import save_state

    fake_bitsandbytes(monkeypatch)
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    one, two = (make_optimizer(parameters, job(use_8bit_adam=True), torch.device("cuda")) for _ in range(2))
    one.step()
    save_state(tmp_path / "optimizer.safetensors", flatten_optimizer(one))
    restore_optimizer(two, load_state(tmp_path / "optimizer.safetensors"))
    restored = two.state[parameters[1]]
    assert (restored["step"], type(restored["step"])) == (1, int)
    assert torch.equal(restored["qmap1"], Eight.map)
    two.step()
    assert two.state[parameters[1]]["state1"].tolist() == [[2, 2], [2, 2]]


def test_adam_s_own_count_stays_a_tensor() -> None:
    student = Projected(make_pico_denoiser().student(), "none")
    optimizer = make_optimizer(list(student.parameters()), job(), torch.device("cpu"))
    student(torch.randn(1, 1, 8, 8), torch.tensor([1])).sample.sum().backward()
    optimizer.step()
    before = flatten_optimizer(optimizer)
    restore_optimizer(optimizer, before)
    assert state_digest(flatten_optimizer(optimizer)) == state_digest(before)
    optimizer.step()
