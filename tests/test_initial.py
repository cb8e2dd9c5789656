"""What a training starts from: the pretrained weights, their average beside them, or weights made anew by the seed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import make_pico_denoiser, make_pico_values, save_pipeline
from deme_diffusion.config import DecoupleSettings
from deme_diffusion.data.splits import Split, SplitName
from deme_diffusion.decoupling.initial import PRETRAINED, Start, fresh_like, layers_of, start_of, started
from deme_diffusion.decoupling.step import total
from deme_diffusion.decoupling.train import train
from deme_diffusion.errors import UserError
from deme_diffusion.files import read_jsonl
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.projection import FILE
from deme_diffusion.pipeline.run import Run, open_run
from deme_diffusion.recipes import Loaded
from deme_diffusion.recipes.checks import parse
from deme_diffusion.weights import WEIGHTS_NAME, State, load_state, save_state
from test_train import Stopping, job, runtime, tensors


def trained_denoiser() -> DDPM:
    """A pico model none of whose tensors is as a new one's, norms included."""
    denoiser, random = make_pico_denoiser(), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in denoiser.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return denoiser


def save_average(pipeline: Path, shift: float = 0.25) -> State:
    """A moved copy of the U-Net's weights in `unet_ema`."""
    state = {key: value + shift for key, value in load_state(pipeline / "unet" / WEIGHTS_NAME).items()}
    (pipeline / "unet_ema").mkdir(exist_ok=True)
    shutil.copy(pipeline / "unet" / "config.json", pipeline / "unet_ema" / "config.json")
    save_state(pipeline / "unet_ema" / WEIGHTS_NAME, state)
    return state


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def anew(denoiser: DDPM, share: float, seed: int = 3) -> tuple[nn.Module, set[str]]:
    """A partly random start, and the names of its layers that are a new module's."""
    student = started(denoiser, Start("partly_random", share, seed))
    fresh, old = layers_of(fresh_like(denoiser.module, seed)), layers_of(denoiser.module)
    found = set()
    for name, own in layers_of(student).items():
        new = [torch.equal(value, fresh[name][key]) for key, value in own.items()]
        kept = [torch.equal(value, old[name][key]) for key, value in own.items()]
        assert all(new) != all(kept), name
        found |= {name} if all(new) else set()
    return student, found


# -- the weights -----------------------------------------------------------------------------------


def test_pretrained_is_the_base_and_share_zero_is_too_to_the_bit() -> None:
    denoiser = trained_denoiser()
    before = {key: value.clone() for key, value in denoiser.module.state_dict().items()}
    assert same(started(denoiser).state_dict(), before)
    assert same(started(denoiser, Start("partly_random", 0.0, 3)).state_dict(), before)
    started(denoiser, Start("random", 1.0, 3))
    assert same(denoiser.module.state_dict(), before)  # the teacher, and what task vectors are relative to


def test_random_is_a_new_module_by_the_seed_and_share_one_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = trained_denoiser()
    before = torch.get_rng_state()
    one = started(denoiser, Start("random", 1.0, 3)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds a GPU's generators"))
    assert same(started(denoiser, Start("random", 1.0, 3)).state_dict(), one)
    assert same(fresh_like(denoiser.module, 3).state_dict(), one)
    assert same(started(denoiser, Start("partly_random", 1.0, 3)).state_dict(), one)
    other = started(denoiser, Start("random", 1.0, 4)).state_dict()
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])
    assert all(not torch.equal(value, denoiser.module.state_dict()[key]) for key, value in one.items())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_partly_random_makes_that_share_of_the_layers_anew(share: float) -> None:
    denoiser = trained_denoiser()
    student, found = anew(denoiser, share)
    assert len(found) == round(share * len(layers_of(denoiser.module)))
    assert found < anew(denoiser, share + 0.1)[1]
    assert found != anew(denoiser, share, seed=4)[1]
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_start_is_keyed_by_the_seed_alone_and_the_default_is_none() -> None:
    assert start_of(DecoupleSettings(), 3, Path("base")) is PRETRAINED
    assert start_of(DecoupleSettings(init="random"), 3, Path("base")) == Start("random", 1.0, 3, Path("base"))
    partly = DecoupleSettings(init="partly_random", init_random_share=0.2)
    assert start_of(partly, 3, Path("base")) == Start("partly_random", 0.2, 3, Path("base"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ema_is_the_average_beside_the_component(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_pipeline(trained_denoiser(), tmp_path / "base")
    state = {key: value.to(dtype) for key, value in save_average(folder).items()}
    save_state(folder / "unet_ema" / WEIGHTS_NAME, state)
    student = started(DDPM.load(folder), Start("ema", folder=folder))
    assert same(student.state_dict(), {key: value.float() for key, value in state.items()})


def test_an_average_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_pipeline(trained_denoiser(), tmp_path / "base")
    state = save_average(folder)
    for wrong in (
        {**state, "conv_in.weight": torch.zeros(1)},
        {k: v for k, v in state.items() if k != "conv_in.weight"},
    ):
        save_state(folder / "unet_ema" / WEIGHTS_NAME, wrong)
        with pytest.raises(UserError, match=r"unet_ema: not the average of the component beside it: conv_in\.weight"):
            started(DDPM.load(folder), Start("ema", folder=folder))


# -- in a training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [Start("random", 1.0, 3), Start("partly_random", 0.5, 3)], ids=lambda s: s.kind)
def test_a_training_with_kernels_from_a_random_start_is_taken_up_to_the_bit(
    tmp_path: Path, digits: dict[SplitName, Split], start: Start
) -> None:
    def made(folder: Path, combine: Any = total) -> None:
        own = replace(job(use_ema=True), projection_axes="both", start=start)
        train(make_pico_denoiser(), digits["train"], own, folder, runtime=runtime(), combine=combine)

    made(tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        made(tmp_path / "again", Stopping(4))
    made(tmp_path / "again")
    assert tensors(tmp_path / "again") == tensors(tmp_path / "whole")
    kernels = load_state(tmp_path / "whole" / "unet" / FILE)
    assert any(name.endswith("|spatial") for name in kernels)


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_the_teacher_is_the_pretrained_model_whatever_the_student_starts_from(
    tmp_path: Path, digits: dict[SplitName, Split], teacher: Any
) -> None:
    def first(start: Start, folder: Path) -> float:
        own = replace(job(steps=1, learning_rate=0.0), start=start, teacher=teacher, projection_axes="spatial")
        train(make_pico_denoiser(), digits["train"], own, folder, runtime=runtime())
        (line,) = read_jsonl(folder / "loss.jsonl")
        return float(line["consistency"])

    assert first(PRETRAINED, tmp_path / "pretrained") < 1e-12
    assert first(Start("random", 1.0, 3), tmp_path / "random") > 1e-3


# -- in a run --------------------------------------------------------------------------------------


def opened(pipeline: Path, folder: Path, init: str, **more: Any) -> Run:
    values = make_pico_values(pipeline)
    values["decouple"] |= {"init": init, "learning_rate": 0.0, "use_ema": False, "projection": "none", "total_steps": 2}
    values["merge"] |= {"search": "none"}
    values["seeds"] = [0, 1] if init == "random" else [0]
    for section, changes in more.items():
        values[section] |= changes
    return open_run(Loaded(parse(values, where="test"), {}), out=folder)


def trainings(run: Run) -> dict[str, State]:
    """Label -> weights of all experts and controls, which are trained for it."""
    nodes = list(run.graph.of_stage("decouple"))
    run.execute(nodes)
    return {node.label: load_state(run.store.folder(node.key) / "unet" / WEIGHTS_NAME) for node in nodes}


def test_all_trainings_of_a_seed_start_from_the_same_random_weights(tmp_path: Path, pico_pipeline: Path) -> None:
    controls = {"controls": ["all-timesteps", "soup"]}
    made = trainings(opened(pico_pipeline, tmp_path / "run", "random", evaluate=controls))
    by_seed = [[state for label, state in made.items() if label.endswith(f"(seed {seed})")] for seed in (0, 1)]
    for states in by_seed:
        assert len(states) == 5  # two experts, two copies of the soup, one on all timesteps
        assert all(same(states[0], other) for other in states)
    assert not same(by_seed[0][0], by_seed[1][0])
    base = load_state(pico_pipeline / "unet" / WEIGHTS_NAME)
    assert not torch.equal(by_seed[0][0]["conv_in.weight"], base["conv_in.weight"])


def test_a_run_from_the_average_and_its_digest(tmp_path: Path) -> None:
    folder = save_pipeline(trained_denoiser(), tmp_path / "base")
    plain = opened(folder, tmp_path / "plain", "pretrained").graph.experts[0][0].digest
    state = save_average(folder)
    run = opened(folder, tmp_path / "run", "ema")
    assert all(same(own, state) for own in trainings(run).values())
    first = run.graph.experts[0][0].digest
    assert first != opened(folder, tmp_path / "other", "pretrained").graph.experts[0][0].digest != plain
    save_average(folder, 0.5)
    assert opened(folder, tmp_path / "again", "ema").graph.experts[0][0].digest != first


def test_a_whole_run_from_partly_random_weights(tmp_path: Path, pico_pipeline: Path) -> None:
    settings = {"init_random_share": 0.3, "learning_rate": 1e-2, "projection": "residual"}
    run = opened(pico_pipeline, tmp_path / "run", "partly_random", decouple=settings, evaluate={"controls": ["soup"]})
    run.execute()
    rows, _ = run.report()
    assert {row["model"] for row in rows} >= {"base", "soup", "ensemble", "merged"}


def test_a_base_without_an_average_is_refused_before_anything_runs(tmp_path: Path, pico_pipeline: Path) -> None:
    with pytest.raises(UserError, match=r"decouple\.init=ema: there is no .*unet_ema; take a base with an average"):
        opened(pico_pipeline, tmp_path / "run", "ema")
    folder = Path(shutil.copytree(pico_pipeline, tmp_path / "base"))
    (folder / "unet_ema").mkdir()
    (folder / "unet_ema" / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"unet_ema has no safetensors"):
        opened(folder, tmp_path / "run", "ema")


@pytest.mark.parametrize("averaged, told", [(True, "are their average already"), (False, "have no average")])
def test_a_base_that_is_trained_here_has_no_other_average(averaged: bool, told: str, pico_pipeline: Path) -> None:
    values = make_pico_values(pico_pipeline)
    values |= {"model": {"pretrained": None}, "pretrain": {"use_ema": averaged}}
    values["decouple"]["init"] = "ema"
    with pytest.raises(UserError, match=f"decouple.init=ema: the base is pretrained here, and its weights {told}"):
        parse(values, where="test")
