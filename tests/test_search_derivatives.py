"""dL/dw of a merged model with its projections, by group, beside what the recipe fixes: against differences."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import component, pico_pretrain
from deme_diffusion.config import LossSettings, MergeSettings
from deme_diffusion.data.splits import Split, SplitName
from deme_diffusion.division import uniform
from deme_diffusion.evaluation.objectives import FixedNoiseObjective
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.differential import Differential, group_of
from deme_diffusion.merging.search import REST, Given, Space
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.models import projection
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.denoiser import Condition
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.models.placement import projections, shape_of, shapes_of
from deme_diffusion.weights import State

N, AT = 2, [0.4, -0.3]


class Double(DDPM):
    """In double precision, where differences of a loss are exact to nine digits."""

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return super().predict(module, x_t.double(), t, condition)


class Toy:
    """A pico base, experts that differ everywhere, and the fixed-noise loss of their merges."""

    def __init__(
        self, folder: Path, split: Split, placement: str, compose: Callable[[Given], MergeWeights] = MergeWeights.of
    ) -> None:
        self.denoiser = Double.from_scratch(pico_pretrain(), out_seed=0)
        module = self.denoiser.module.double().eval()
        base = component(folder / "base", module.state_dict())
        experts = [self._expert(folder / f"expert {i}", placement, i) for i in range(N)]
        self.merger = Merger(base, experts)
        self.shell = Double.from_scratch(pico_pretrain(), out_seed=1).module.double().eval()
        self.differential = Differential(self.merger, self.shell, compose)
        self.compose = compose
        few = Split("search", split.source, split.indices[:12], split.settings)
        ranges = [uniform(2, 20).served(i) for i in range(2)]
        self.noise = FixedNoise(self.denoiser, few, ranges, LossSettings(draws=2), batch_size=5)

    def _expert(self, folder: Path, placement: str, seed: int) -> Path:
        random, module = torch.Generator().manual_seed(seed), self.denoiser.module
        state: State = {
            key: value + 0.05 * torch.randn(value.shape, generator=random, dtype=value.dtype)
            for key, value in module.state_dict().items()
        }
        path, shapes = component(folder, state), shapes_of(module)
        names = projections(module, *placement.split())[seed:]  # the first expert alone has the first
        sizes = {name: shape_of(name, shapes) or () for name in names}
        matrices = {n: 0.05 * torch.randn(size, generator=random, dtype=torch.float64) for n, size in sizes.items()}
        projection.save(path, matrices)
        return path

    def objective(self, **options: Any) -> FixedNoiseObjective:
        def materialise(weights: Given) -> nn.Module:
            return self.merger.into(self.shell, self.compose(weights))

        experts: Sequence[Callable[[], nn.Module]] = [lambda: self.shell for _ in range(N)]
        base = self.denoiser.module
        return FixedNoiseObjective(self.noise, base, experts, materialise, derivative=self.differential, **options)


@pytest.fixture
def toy(tmp_path: Path, digits: dict[SplitName, Split], request: pytest.FixtureRequest) -> Toy:
    return Toy(tmp_path, digits["search"], getattr(request, "param", "none"))


def difference(value: Callable[[Any], float], at: Callable[[float], Any], h: float = 1e-5) -> float:
    """Central."""
    return (value(at(h)) - value(at(-h))) / (2 * h)


def moved(weights: Sequence[float], i: int, h: float) -> list[float]:
    return [w + h * (i == j) for j, w in enumerate(weights)]


@pytest.mark.parametrize("toy", ["none", "residual", "block", "residual both", "block both"], indirect=True)
@pytest.mark.parametrize("relative, at", [(False, AT), (True, AT), (False, [0.0, 0.0])])
def test_gradient_is_that_of_the_loss(toy: Toy, relative: bool, at: list[float]) -> None:
    objective = toy.objective(relative=relative)
    value, rows = objective.gradient(at)
    assert value == pytest.approx(objective.value(at), rel=1e-12)
    assert set(rows) == {REST}
    expected = [difference(objective.value, lambda h, i=i: moved(at, i, h)) for i in range(N)]  # type: ignore[misc]
    np.testing.assert_allclose(rows[REST], expected, rtol=1e-5)
    if relative:
        assert objective.value([0.0, 0.0]) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("toy", ["residual", "block", "residual both"], indirect=True)
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_gradient_by_group_is_that_of_the_loss_and_its_sum_the_whole_models(toy: Toy, granularity: str) -> None:
    objective = toy.objective()
    space = toy.differential.space(MergeSettings.model_validate({"granularity": granularity}))
    draw = np.random.default_rng(0)
    point = space.spread(AT) + 0.1 * draw.normal(size=(len(space.groups), N))
    rows = space.rows(objective.gradient(space.candidate(point, "").merge_weights)[1])
    assert rows.shape == point.shape
    for row, i in itertools.product(range(0, len(space.groups), 1 + len(space.groups) // 6), range(N)):

        def at(h: float, row: int = row, i: int = i) -> MergeWeights:
            there = point.copy()
            there[row, i] += h
            return space.candidate(there, "").merge_weights

        assert rows[row, i] == pytest.approx(difference(objective.value, at), rel=1e-4, abs=1e-9)
    alike = space.rows(objective.gradient(space.candidate(space.spread(AT), "").merge_weights)[1])
    np.testing.assert_allclose(alike.sum(0), objective.gradient(AT)[1][REST], rtol=1e-9)


def test_groups_hold_every_parameter_and_what_folds_nowhere_has_weights_too(
    toy: Toy, tmp_path: Path, digits: dict[SplitName, Split]
) -> None:
    space = toy.differential.space(MergeSettings(granularity="block"))
    assert {"down_blocks.0.*", "mid_block.*", "up_blocks.1.*", "conv_in.*", "time_embedding.*"} <= set(space.groups)
    layers = toy.differential.space(MergeSettings(granularity="layer"))
    assert "down_blocks.0.resnets.0.conv1.*" in layers.groups and REST not in layers.groups
    for each in (space, layers):
        assert sum(each.shares) == pytest.approx(1.0)
        toy.merger.check(each.candidate(each.spread(AT), "").merge_weights)
    assert group_of("scale", "layer") == "scale"
    blocks = Toy(tmp_path / "block", digits["search"], "block")
    assert blocks.differential.unfolded
    assert blocks.differential.space(MergeSettings(granularity="layer")).groups[0] == REST
    assert REST not in blocks.differential.space(MergeSettings(granularity="block")).groups


def test_model_of_equal_groups_is_the_model_of_plain_weights(toy: Toy) -> None:
    space: Space = toy.differential.space(MergeSettings(granularity="layer"))
    grouped, plain = toy.merger.state(space.candidate(space.spread(AT), "").merge_weights), toy.merger.state(AT)
    assert all(torch.equal(grouped[key], plain[key]) for key in plain)


def test_what_the_recipe_fixes_has_no_part_in_the_gradient(tmp_path: Path, digits: dict[SplitName, Split]) -> None:
    fixed = {"mid_block.*": (0.7, 0.1)}

    def compose(weights: Given) -> MergeWeights:
        given = MergeWeights.of(weights)
        return MergeWeights(given.values, {**given.rules, **fixed}, {"conv_out.*": "base", "conv_in.*": 1})

    objective = Toy(tmp_path, digits["search"], "residual", compose).objective()
    expected = [difference(objective.value, lambda h, i=i: moved(AT, i, h)) for i in range(N)]  # type: ignore[misc]
    rows = objective.gradient(AT)[1]
    np.testing.assert_allclose(rows[REST], expected, rtol=1e-5)
    ruled = objective.gradient(MergeWeights((0.0, 0.0), {"mid_block.*": tuple(AT), "up_blocks.*": tuple(AT)}))[1]
    assert ruled["mid_block.*"] == (0.0, 0.0)  # the recipe's weights win there
    assert min(map(abs, ruled["up_blocks.*"])) > 0


def test_steps_take_every_point_once_before_one_comes_again(toy: Toy) -> None:
    objective = toy.objective(step_points=8)  # of 2 ranges x 12 images x 2 draws
    assert objective.gradient_cost(0) * 6 == pytest.approx(objective.gradient_cost()) == 3.0
    steps = [objective.gradient(AT, step) for step in range(6)]
    few = toy.objective(step_points=8, backward_batch=3).gradient(AT, 0)
    assert few[0] == pytest.approx(steps[0][0], rel=1e-12)
    value, rows = objective.gradient(AT)
    assert np.mean([each for each, _ in steps]) == pytest.approx(value, rel=1e-10)
    np.testing.assert_allclose(np.mean([each[REST] for _, each in steps], axis=0), rows[REST], rtol=1e-9)
    assert len({each for each, _ in steps}) == len(steps)
    assert objective.gradient(AT, 0) == steps[0] != objective.gradient(AT, 6)


@pytest.mark.parametrize("toy", ["residual"], indirect=True)
@pytest.mark.parametrize("relative", [False, True])
def test_equations_anywhere_hold_the_gradient_of_the_loss(
    toy: Toy, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d/dw at `at` of || r - J (w - at) ||^2 is 2 (A at - b), of sums over elements where the loss is a mean."""
    monkeypatch.setattr("deme_diffusion.evaluation.objectives.SECANT", 1e-5)
    objective = toy.objective(relative=relative)
    elements = int(np.prod(toy.denoiser.sample_shape))
    a, b = objective.normal_equations(AT)
    np.testing.assert_allclose(a, a.T)
    slope = 2 * (a @ np.array(AT) - b) / elements
    np.testing.assert_allclose(slope, objective.gradient(AT)[1][REST], rtol=1e-3)


def test_equations_by_secants_near_to_derivatives_as_the_step_falls(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, elements = toy.objective(), int(np.prod(toy.denoiser.sample_shape))
    exact, errors = np.array(objective.gradient(AT)[1][REST]), []
    for step in (0.1, 0.01, 0.001):
        monkeypatch.setattr("deme_diffusion.evaluation.objectives.SECANT", step)
        a, b = objective.normal_equations(AT)
        errors.append(float(np.abs(2 * (a @ np.array(AT) - b) / elements - exact).max()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
