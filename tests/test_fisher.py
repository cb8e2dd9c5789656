"""F is the mean squared gradient of each sample's own log-likelihood, of the expert's own timesteps alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from conftest import T, make_pico_denoiser
from deme_diffusion.data.splits import Split, SplitName
from deme_diffusion.evaluation import fisher
from deme_diffusion.models import projection
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.placement import shape_of, shapes_of
from deme_diffusion.models.projection import Projected
from deme_diffusion.pipeline import needs, space
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.recipes.checks import parse
from deme_diffusion.weight_files import FISHER_METADATA
from deme_diffusion.weights import State, load_state

SUBSET = [[10, 20]]


def doubled(denoiser: DDPM) -> DDPM:
    denoiser.module.double()
    return denoiser


def matrices_of(module: nn.Module, places: list[str]) -> State:
    shapes = shapes_of(module)
    generator = torch.Generator().manual_seed(1)
    sizes = {name: shape_of(name, shapes) or () for name in places}
    return {name: 0.1 * torch.randn(size, dtype=torch.float64, generator=generator) for name, size in sizes.items()}


def loop(denoiser: DDPM, student: nn.Module, split: Split, samples: int) -> dict[str, torch.Tensor]:
    """The mean squared gradient by one backward pass a sample."""
    total = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    for i in range(samples):
        one = fisher.points(denoiser, split, SUBSET, 7, i, i + 1, torch.device("cpu"))
        student.zero_grad()
        prediction = denoiser.predict(student, one.x_t.double(), one.t, {})
        (0.5 * (one.target.double() - prediction).square().sum()).backward()  # type: ignore[no-untyped-call]
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None
            total[name] += parameter.grad.square()
    return {name: value / samples for name, value in total.items()}


@pytest.mark.parametrize("placement", ["none", "residual", "block", "residual both", "block spatial"])
def test_squared_gradients_are_those_of_a_loop_over_samples(
    placement: str, digits: dict[SplitName, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of D, at the expert's D on its unfolded weights: as `Projected`, in which it was trained, differentiates."""
    denoiser, split = doubled(make_pico_denoiser()), digits["train"]
    monkeypatch.setattr(denoiser, "noised", in_double(denoiser.noised))
    trained = Projected(make_pico_denoiser().module.double(), *placement.split())
    matrices = matrices_of(denoiser.module, trained.projection.places)
    for matrix, value in zip(trained.projection.matrices, matrices.values(), strict=True):
        matrix.data.copy_(value)
    expected = loop(denoiser, trained, split, 5)
    module = projection.attach(denoiser.module, matrices)
    *_, (sums, stop) = fisher.sums_of(denoiser, module, split, SUBSET, samples=5, seed=7)
    assert stop == 5
    plain = {k.removeprefix("component."): v for k, v in expected.items() if k.startswith("component.")}
    ofd = {f"projection.{p}": expected[f"projection.matrices.{i}"] for i, p in enumerate(trained.projection.places)}
    assert sums.keys() == plain.keys() | ofd.keys()
    assert plain.keys() == denoiser.module.state_dict().keys()
    for key, value in {**plain, **ofd}.items():
        torch.testing.assert_close(sums[key] / 5, value, rtol=1e-9, atol=1e-15)
    assert all(bool((value > 0).any()) for value in sums.values())


def in_double(noised: Any) -> Any:
    def made(batch: dict[str, Any], t: torch.Tensor, noise: torch.Tensor) -> Any:
        return noised({"image": batch["image"].double()}, t, noise.double())

    return made


def test_attention_has_per_sample_gradients_as_well(digits: dict[SplitName, Split]) -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    options: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 2}
    unet = UNet2DModel(**options, block_out_channels=(4, 8), attention_head_dim=4, layers_per_block=1, **blocks)
    denoiser = DDPM(unet.eval(), make_pico_denoiser().scheduler)
    ((sums, _),) = fisher.sums_of(denoiser, unet, digits["train"], SUBSET, samples=3, seed=7)
    expected = loop(doubled(denoiser), unet, digits["train"], 3)
    for key, value in expected.items():
        torch.testing.assert_close(sums[key].double() / 3, value, rtol=1e-3, atol=1e-5 * float(value.max()) + 1e-12)


def test_timesteps_are_the_experts_own(digits: dict[SplitName, Split], pico_denoiser: DDPM) -> None:
    subset = [[3, 7], [15, 16]]
    t = fisher.points(pico_denoiser, digits["train"], subset, 0, 0, 400, torch.device("cpu")).t
    assert set(t.tolist()) == {3, 4, 5, 6, 15}
    counts = np.bincount(t.numpy(), minlength=T)
    assert counts[counts > 0].min() > 50  # uniform: 80 each


def test_samples_depend_on_their_index_alone(digits: dict[SplitName, Split], pico_denoiser: DDPM) -> None:
    where = (pico_denoiser, digits["train"], SUBSET, 3)
    whole, part = (fisher.points(*where, i, 9, torch.device("cpu")) for i in (0, 6))
    for name in ("x_t", "t", "target"):
        assert torch.equal(getattr(whole, name)[6:], getattr(part, name))
    other = fisher.points(pico_denoiser, digits["train"], SUBSET, 4, 0, 9, torch.device("cpu"))
    assert not torch.equal(other.target, whole.target)


def test_memory_bounds_how_many_gradients_are_held(pico_denoiser: DDPM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fisher.chunk_of(pico_denoiser.module) == fisher.MOST_SAMPLES
    size = 4 * sum(p.numel() for p in pico_denoiser.module.parameters())
    monkeypatch.setattr(fisher, "MOST_BYTES", 3.5 * size)
    assert fisher.chunk_of(pico_denoiser.module) == 3
    monkeypatch.setattr(fisher, "MOST_BYTES", 0.5 * size)
    assert fisher.chunk_of(pico_denoiser.module) == 1


def test_interrupted_stage_goes_on_to_the_same_bits(
    tmp_path: Path, digits: dict[SplitName, Split], pico_denoiser: DDPM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "MOST_SAMPLES", 2)
    monkeypatch.setattr(fisher, "SAVE_SECONDS", -1.0)

    def write(folder: Path) -> None:
        fisher.write_fisher(
            folder, pico_denoiser, pico_denoiser.module, digits["train"], SUBSET, samples=7, seed=1, expert="e"
        )

    write(tmp_path / "whole")
    drawn, points = [], fisher.points

    def stopping(*arguments: Any) -> Any:
        drawn.append(arguments[4])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return points(*arguments)

    monkeypatch.setattr(fisher, "points", stopping)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "broken")
    assert not (tmp_path / "broken" / fisher.FILE).exists()
    write(tmp_path / "broken")
    assert drawn == [0, 2, 4, 4, 6]
    whole, broken = (load_state(tmp_path / name / fisher.FILE) for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert {value.dtype for value in whole.values()} == {torch.float32}
    with safe_open(tmp_path / "whole" / fisher.FILE, framework="pt") as file:
        about = json.loads(file.metadata()[FISHER_METADATA])
    assert about == {"subset": SUBSET, "samples": 7, "seed": 1, "expert": "e"}


def test_plan_counts_what_the_information_costs(pico_values: dict[str, Any]) -> None:
    merge = {**pico_values["merge"], "search": "none", "method": "fisher", "fisher_samples": 40}
    graph = Graph(parse({**pico_values, "merge": merge}, where="test"))
    cost = needs.model_cost(graph)
    assert cost is not None
    stages = list(graph.of_stage("fisher"))
    assert [needs.flops(graph, node, cost) for node in stages] == [3 * 40 * cost.flops] * 2
    assert space.disk(graph, stages, cost)["weights"] == 2 * 4 * cost.parameters
