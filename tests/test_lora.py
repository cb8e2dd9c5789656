"""LoRA experts: adapters in and out, one copy of the base, training to the bit, what stock diffusers loads."""

from __future__ import annotations

import gc
import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import tiny
import tiny_flow
from deme_diffusion.config import DecoupleSettings, ModelSettings, RuntimeSettings
from deme_diffusion.data.splits import Split, SplitName
from deme_diffusion.decoupling import memory
from deme_diffusion.decoupling.step import total
from deme_diffusion.division import Division
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.lora import read_lora
from deme_diffusion.lora_files import LORA_NAME
from deme_diffusion.models import lora
from deme_diffusion.models.adapters import SwitchedEnsemble
from deme_diffusion.models.families import family
from deme_diffusion.models.stable_diffusion import StableDiffusion
from deme_diffusion.recipes.checks import parse
from deme_diffusion.weights import load_state, state_digest
from lora_models import LORA, answered, inputs, job, random_factors, saved, trained, trained_on

CPU = torch.device("cpu")
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "stable_diffusion": tiny.stable_diffusion,
    "stable_diffusion_xl": tiny.stable_diffusion_xl,
    "stable_diffusion_3": tiny_flow.stable_diffusion_3,
    "flux": tiny_flow.flux,
    "wan": tiny_flow.wan,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion; read only."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="module")
def images(digits: dict[SplitName, Split]) -> Split:
    """Captioned digits."""
    return replace(digits["train"], carries="text")


@pytest.fixture(scope="module")
def done(base: Path, images: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of four steps."""
    folder = tmp_path_factory.mktemp("done")
    trained(base, images, folder)
    return folder


# --- in and out ---------------------------------------------------------------------------------------------------


def test_adapters_come_out_as_they_went_in(base: Path) -> None:
    module = StableDiffusion.load(base).module
    before = {key: value.data_ptr() for key, value in module.state_dict().items()}
    numbers, drawn = answered(module), torch.get_rng_state()
    adapted = lora.adapt(module, LORA, seed=0)
    assert torch.equal(drawn, torch.get_rng_state())  # peft's own factors took nothing from it
    held = {key.replace(".base_layer.", "."): value.data_ptr() for key, value in module.state_dict().items()}
    assert before.items() <= held.items()  # the base's own tensors, and no copies
    assert torch.equal(answered(adapted.component), numbers)  # B = 0
    assert {name.split(".")[-3] for name in adapted.own_state()} == {"lora_A", "lora_B"}
    assert lora.take_out(module) is module
    assert {key: value.data_ptr() for key, value in module.state_dict().items()} == before
    assert not hasattr(module, "peft_config") and torch.equal(answered(module), numbers)


def test_factors_are_drawn_by_key_and_in_float32_whatever_the_base_is_held_in(base: Path) -> None:
    wide = lora.adapt(StableDiffusion.load(base).module, LORA, seed=0).own_state()
    half = lora.adapt(StableDiffusion.load(base, torch.bfloat16).module, LORA, seed=0).own_state()
    other = lora.adapt(StableDiffusion.load(base).module, LORA, seed=1).own_state()
    downs = {name: value for name, value in wide.items() if ".lora_A." in name}
    assert {value.dtype for value in half.values()} == {torch.float32}
    assert all(torch.equal(value, half[name]) for name, value in wide.items())
    assert not any(torch.equal(value, other[name]) for name, value in downs.items())
    assert len({state_digest({"": value}) for value in downs.values()}) == len(downs)
    assert abs(float(torch.cat([v.flatten() for v in downs.values()]).std()) * LORA.rank - 1) < 0.1
    assert all(not value.any() for name, value in wide.items() if ".lora_B." in name)


def test_a_base_in_half_precision_answers_in_it(base: Path) -> None:
    module = StableDiffusion.load(base, torch.bfloat16).module
    adapted = lora.adapt(module, LORA, seed=0)
    x, t, states = inputs()
    answer = adapted(x.bfloat16(), t, states.bfloat16())[0]
    answer.float().square().mean().backward()
    assert answer.dtype == torch.bfloat16
    gradients = [parameter.grad for parameter in lora.parameters_of(module) if parameter.grad is not None]
    assert gradients and {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(parameter.grad is None for name, parameter in module.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("to_qq",), r"no layer of the UNet2DConditionModel ends in to_qq; did you mean 'to_q'\?"),
        (("to_out",), r"to_out: .*to_out is a ModuleList, .*did you mean 'to_out\.0'\?"),
        (("norm1",), r"norm1: .* is a \w+Norm, and no linear layer or convolution"),
    ],
)
def test_targets_that_the_model_does_not_have(base: Path, targets: tuple[str, ...], said: str) -> None:
    module = StableDiffusion.load(base).module
    with pytest.raises(UserError, match=said):
        lora.layers_for(module, targets)


def test_default_targets_are_those_of_diffusers_scripts(base: Path) -> None:
    names = lora.layers_for(StableDiffusion.load(base).module, None)
    assert {name.split(".attn")[1][2:] for name in names} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(names) == 4 * sum(name.endswith("to_q") for name in names)


def test_a_missing_peft_is_one_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"LoRA needs peft: pip install 'deme-diffusion\[text\]'"):
        lora.adapt(StableDiffusion.load(base).module, LORA, seed=0)


def test_a_broken_peft_is_not_called_missing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = StableDiffusion.load(base).module
    for broken in (types.ModuleType("peft"), None):
        monkeypatch.setitem(sys.modules, "peft", broken)
        if broken is None:  # something that peft itself needs
            monkeypatch.delitem(sys.modules, "peft")
            for name in [name for name in sys.modules if name.startswith("peft.")]:
                monkeypatch.delitem(sys.modules, name)
            monkeypatch.setitem(sys.modules, "accelerate", None)
        with pytest.raises(MachineError, match=r"peft is there, and cannot be imported: .*install it again"):
            lora.adapt(module, LORA, seed=0)


# --- stock diffusers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_pipelines_load_our_model(tmp_path: Path, name: str) -> None:
    folder = FAMILIES[name](tmp_path / name)
    denoiser = family(name).load(folder)
    denoiser.configure(ModelSettings(family=name, **({"resolution": 16} if name == "wan" else {})))  # type: ignore[arg-type]
    layers = random_factors(denoiser.module, 2, seed=0, scale=0.05)
    first = next(iter(layers))
    layers[first] = replace(random_factors(denoiser.module, 3, seed=1)[first], scale=0.2)  # another rank and alpha
    saved(tmp_path / "lora", layers, denoiser.component)
    config = json.loads((folder / denoiser.component / "config.json").read_text())
    lora.attach(denoiser.module, read_lora(tmp_path / "lora", denoiser.component, config))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "lora")
    theirs = getattr(pipeline, denoiser.component)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, *denoiser.sample_shape, generator=draw)
    condition = denoiser.placeholder(2)
    t = torch.tensor([3, 8])
    with torch.no_grad():
        ours, stock = (denoiser.predict(module.eval(), x, t, condition) for module in (denoiser.module, theirs))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-6)
    lora.take_out(denoiser.module)
    with torch.no_grad():
        assert not torch.allclose(denoiser.predict(denoiser.module, x, t, condition), stock, atol=1e-4)


def test_fused_is_attached_but_for_rounding(base: Path, tmp_path: Path) -> None:
    one, other = (StableDiffusion.load(base).module for _ in range(2))
    layers = random_factors(one, 2, 0, ("to_q", "conv1", "proj_in", "conv_in"), scale=0.1)
    found = read_lora(saved(tmp_path / "lora", layers), "unet", {})
    torch.testing.assert_close(
        answered(lora.fused(one, found)), answered(lora.attach(other, found)), rtol=1e-4, atol=1e-5
    )
    assert set(one.state_dict()) == set(StableDiffusion.load(base).module.state_dict())


# --- training -----------------------------------------------------------------------------------------------------


def living() -> dict[int, int]:
    """Storage -> size of every parameter in this process."""
    gc.collect()
    found = (p for p in gc.get_objects() if isinstance(p, nn.Parameter) and not isinstance(p, FakeTensor))
    return {p.data_ptr(): p.numel() for p in found}


def test_a_step_holds_one_copy_of_the_base(base: Path, images: Split, tmp_path: Path) -> None:
    denoiser = StableDiffusion.load(base)
    _ = denoiser.pipeline  # its encoders, before anything is counted
    own, seen = {p.data_ptr() for p in denoiser.module.parameters()}, list[tuple[int, int, bool]]()

    def looking(losses: dict[int, torch.Tensor]) -> torch.Tensor:
        alive = living()
        adapters = sum(p.numel() for p in lora.parameters_of(denoiser.module))
        seen.append((sum(alive.values()), adapters, own <= alive.keys()))
        return total(losses)

    before = sum(living().values())
    trained_on(denoiser, images, tmp_path, job(2), combine=looking)
    assert seen == [(before + seen[0][1], seen[0][1], True)] * 2
    assert 0 < seen[0][1] < sum(p.numel() for p in denoiser.module.parameters()) / 5


def test_the_teacher_is_the_student_without_its_adapters(base: Path) -> None:
    module = StableDiffusion.load(base).module
    plain = answered(module.eval())
    adapted, teacher = lora.adapt(module, LORA, seed=0).train(), lora.Bare(module)
    with torch.no_grad():
        for parameter in lora.parameters_of(module):
            parameter.add_(0.3)
    assert torch.equal(answered(teacher), plain) and not torch.allclose(answered(adapted), plain)
    assert module.training and not list(teacher.parameters()) and teacher.component is module
    assert all(parameter.requires_grad for parameter in lora.parameters_of(module))


def test_what_a_training_leaves(base: Path, done: Path) -> None:
    names = {path.relative_to(done).as_posix() for path in done.rglob("*.safetensors")}
    assert {LORA_NAME, f"raw/{LORA_NAME}"} <= names and not any("diffusion_pytorch_model" in name for name in names)
    averaged, raw = (read_lora(folder, "unet", {}) for folder in (done, done / "raw"))
    assert {own.scale for own in averaged.layers.values()} == {1.5}  # alpha / r
    assert any(not torch.equal(averaged.layers[n].up, raw.layers[n].up) for n in raw.layers)
    state = load_state(done / "work" / "checkpoint-00000004" / "state.safetensors")
    assert all(".lora_" in key for key in state if key.startswith("model/"))
    size = sum(value.numel() for key, value in state.items() if key.startswith("model/"))
    assert size == sum(value.numel() for key, value in state.items() if key.startswith("ema/"))
    assert sum(value.numel() for value in state.values()) < 4 * size + 200  # and AdamW's two moments, with their counts


def test_an_expert_at_learning_rate_0_equals_the_base(base: Path, images: Split, tmp_path: Path) -> None:
    denoiser = trained(base, images, tmp_path, job(2, learning_rate=0.0))
    plain = answered(denoiser.module)
    assert torch.equal(answered(lora.attach(denoiser.module, read_lora(tmp_path, "unet", {}))), plain)


class Died(Exception):
    """As good as a kill."""


@pytest.mark.parametrize("after", [2, 4])
def test_a_training_that_died_is_taken_up_to_the_bit(
    base: Path, images: Split, done: Path, tmp_path: Path, after: int
) -> None:
    calls = iter(range(1, 100))

    def dying(losses: dict[int, torch.Tensor]) -> torch.Tensor:
        if next(calls) == after:
            raise Died
        return total(losses)

    denoiser = StableDiffusion.load(base)
    before = state_digest(denoiser.module.state_dict())
    with pytest.raises(Died):
        trained_on(denoiser, images, tmp_path, combine=dying)
    assert state_digest(denoiser.module.state_dict()) == before  # the adapters are out again
    trained_on(denoiser, images, tmp_path)
    for name in (LORA_NAME, f"raw/{LORA_NAME}", "work/checkpoint-00000004/state.safetensors"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes(), name


def test_the_next_expert_in_a_process_starts_clean(base: Path, images: Split, done: Path, tmp_path: Path) -> None:
    denoiser = trained(base, images, tmp_path / "first", job(2, seed=7))
    trained_on(denoiser, images, tmp_path / "second")
    assert (tmp_path / "second" / LORA_NAME).read_bytes() == (done / LORA_NAME).read_bytes()


@pytest.mark.parametrize("option", ["gradient_checkpointing", "channels_last", "offload_ema"])
def test_what_saves_memory_changes_no_more_than_the_last_bits(
    base: Path, images: Split, done: Path, tmp_path: Path, option: str
) -> None:
    denoiser = trained(base, images, tmp_path, **{option: True})
    ours, plain = (load_state(folder / LORA_NAME) for folder in (tmp_path, done))
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)
    assert not any(getattr(part, "gradient_checkpointing", False) for part in denoiser.module.modules())
    assert all(p.is_contiguous() for p in denoiser.module.parameters())


def test_the_best_weights_are_kept_and_are_the_adapters_alone(base: Path, images: Split, tmp_path: Path) -> None:
    trained(base, images, tmp_path, job(keep="best"))
    (best,) = (tmp_path / "work").glob("best-*.safetensors")
    kept = read_lora(tmp_path, "unet", {}).layers
    state = load_state(best)
    assert all(".lora_" in key for key in state)
    assert all(torch.equal(state[f"{name}.lora_B.default.weight"], own.up) for name, own in kept.items())


def test_memory_is_reckoned_with_one_base_and_gradients_of_adapters(base: Path) -> None:
    denoiser = StableDiffusion.load(base)
    adapted, full = (memory.estimate(denoiser, job(lora=own), RuntimeSettings(), CPU) for own in (LORA, None))
    size = memory.size_of(denoiser.module)
    module = lora.adapt(StableDiffusion.load(base).module, LORA, seed=0).component
    adapters = sum(4 * parameter.numel() for parameter in lora.parameters_of(module))
    assert (adapted["base"], adapted["weights"], adapted["gradients"]) == (size, adapters, adapters)
    assert (adapted["optimizer"], adapted["ema"], adapted["teacher"]) == (2 * adapters, adapters, 0)
    assert adapted["activations"] < full["activations"] and full["weights"] == size
    assert memory.altogether(denoiser, job(), RuntimeSettings(), CPU) == sum(adapted.values())


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decouple", "merge", "said"),
    [
        ({"projection": "residual"}, {}, "projection=residual: LoRA leaves the base as it is"),
        ({"teacher_dtype": "bfloat16"}, {}, r"teacher_dtype=bfloat16: .*held and run in model\.dtype"),
        ({"teacher": "ema"}, {}, "teacher=ema: LoRA leaves"),
        ({}, {"max_shard_size": "1GB"}, r"merge\.max_shard_size: a merged LoRA is one small file"),
        ({}, {"fuse": True, "lora_rank": 2}, "leave out one of lora_rank and fuse"),
        ({"lora_rank": None}, {"fuse": True}, r"merge\.fuse: the experts are no LoRAs"),
    ],
)
def test_settings_that_do_not_go_with_lora(decouple: dict[str, Any], merge: dict[str, Any], said: str) -> None:
    values = {
        "model": {"family": "stable_diffusion", "pretrained": "owner/name"},
        "decouple": {"projection": "none", "lora_rank": 2, **decouple},
        "merge": merge,
    }
    with pytest.raises(UserError, match=said):
        parse(values, where="recipe")


def test_families_without_a_loader_are_fused() -> None:
    values = {"decouple": {"projection": "none", "lora_rank": 2}}
    with pytest.raises(UserError, match=r"merge\.fuse: stock pipelines of family ddpm load no LoRA"):
        parse(values, where="recipe")
    assert parse({**values, "merge": {"fuse": True}}, where="recipe").merge.fuse
    assert DecoupleSettings(projection="none", lora_rank=2).lora_rank == 2


# --- serving ------------------------------------------------------------------------------------------------------


def test_an_ensemble_holds_one_base_and_switches_its_adapters(base: Path, tmp_path: Path) -> None:
    denoiser = StableDiffusion.load(base)
    loras, alone = [], []
    for i, targets in enumerate([None, ("to_q", "conv1")]):  # which adapt other layers
        folder = saved(tmp_path / str(i), random_factors(denoiser.module, 2 + i, i, targets, 0.1))
        loras.append(read_lora(folder, "unet", {}))
        alone.append(lora.attach(StableDiffusion.load(base).module, loras[-1]))
    member = np.zeros((2, 20), dtype=bool)
    member[0, :10] = member[1, 10:] = True
    division = Division(member, np.repeat([0, 1], 10))
    plain = sum(p.numel() for p in denoiser.module.parameters())
    ensemble = SwitchedEnsemble(denoiser.module, loras, division, denoiser.index).eval()
    x, t, states = inputs()  # t = 0, 7, 14: two experts in one batch
    with torch.no_grad():
        mixed = ensemble(x, t, states).sample
        for i, rows in ((0, slice(0, 2)), (1, slice(2, 3))):
            expected = alone[i](x[rows], t[rows], states[rows])[0]
            assert torch.equal(mixed[rows], expected)
            assert torch.equal(ensemble(x[rows], t[rows], encoder_hidden_states=states[rows]).sample, expected)
    adapters = sum(own.down.numel() + own.up.numel() for found in loras for own in found.layers.values())
    assert sum(p.numel() for p in ensemble.parameters()) == plain + adapters
    assert ensemble.config.in_channels == 4 and ensemble.dtype == torch.float32
