"""The search proposes what it should, scores each point once on the search split, and resumes where it stopped."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_pico_denoiser
from deme_diffusion.artefacts import Store
from deme_diffusion.config import LossSettings, MergeSettings, Recipe, SamplerSettings
from deme_diffusion.data.splits import Split, SplitName
from deme_diffusion.division import uniform
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation import objectives
from deme_diffusion.evaluation.extractors.classifier import SmallClassifier
from deme_diffusion.evaluation.metrics import frechet_distance, kernel_distance, statistics
from deme_diffusion.evaluation.objectives import FixedNoiseObjective, FrechetObjective, KernelObjective, refuse_report
from deme_diffusion.merging.search import (
    Candidate,
    Given,
    Space,
    Trial,
    always,
    best,
    candidates,
    grid,
    least_squares_weights,
    score,
    uniform_weights,
)
from deme_diffusion.merging.search.checks import shaping
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.stages import Stages


class Counting:
    """|| w - target ||^2, and what it was asked."""

    def __init__(self, target: Sequence[float]) -> None:
        self.target, self.asked = list(target), list[list[float]]()

    def value(self, weights: Given) -> float:
        self.asked.append(list(values := MergeWeights.of(weights).values))
        return sum((w - t) ** 2 for w, t in zip(values, self.target, strict=True))


class Quadratic:
    """Normal equations that were worked out before."""

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        self.a, self.b = a, b

    def normal_equations(self) -> tuple[np.ndarray, np.ndarray]:
        return self.a, self.b


def never() -> Any:
    raise AssertionError("the normal equations were asked for")


def known_quadratic(n: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, b and the optimum of || X w - y ||^2 with y in the range of X."""
    random = np.random.default_rng(seed)
    x, optimum = random.normal(size=(50, n)), random.normal(size=n)
    return x.T @ x / 50, x.T @ (x @ optimum) / 50, optimum


# least squares


def test_without_a_ridge_the_known_optimum_is_recovered() -> None:
    a, b, optimum = known_quadratic()
    np.testing.assert_allclose(least_squares_weights(a, b, 0.0), optimum, rtol=1e-9)


def test_ridge_is_relative_to_the_mean_diagonal() -> None:
    a, b, _ = known_quadratic()
    expected = np.linalg.solve(a + 0.1 * np.mean(np.diag(a)) * np.eye(4), b)
    np.testing.assert_allclose(least_squares_weights(a, b, 0.1), expected, rtol=1e-9)
    np.testing.assert_allclose(least_squares_weights(1e6 * a, 1e6 * b, 0.1), expected, rtol=1e-9)


def test_huge_ridge_pulls_every_weight_to_zero() -> None:
    a, b, optimum = known_quadratic()
    norms = [float(np.linalg.norm(least_squares_weights(a, b, ridge))) for ridge in (0.0, 0.1, 1.0, 1e6)]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] == pytest.approx(np.linalg.norm(optimum))
    assert norms[-1] < 1e-5


def test_two_equal_experts_share_the_weight_though_a_is_singular() -> None:
    a, b = np.ones((2, 2)), np.ones(2)
    np.testing.assert_allclose(least_squares_weights(a, b, 0.0), [0.5, 0.5], atol=1e-12)
    np.testing.assert_allclose(least_squares_weights(a, b, 1e-9), [0.5, 0.5], atol=1e-6)


def test_experts_that_changed_nothing_get_no_weight() -> None:
    assert least_squares_weights(np.zeros((2, 2)), np.zeros(2), 1e-3).tolist() == [0.0, 0.0]


# the normal equations of the fixed-noise loss


Experts = tuple[FixedNoiseObjective, FixedNoise]


@pytest.fixture(scope="module")
def linear(digits: dict[SplitName, Split]) -> Experts:
    """Experts that differ from the base in their last convolution only: the model is linear in w, to the last term."""
    denoiser = make_pico_denoiser()
    experts = [expert_of(denoiser, seed) for seed in (1, 2, 3)]
    shell = make_pico_denoiser().module.eval()

    def materialise(weights: Sequence[float]) -> nn.Module:
        base = denoiser.module.state_dict()
        states = [expert.state_dict() for expert in experts]
        merged = {k: v + sum(w * (s[k] - v) for w, s in zip(weights, states, strict=True)) for k, v in base.items()}
        shell.load_state_dict(merged)
        return shell

    split = Split("search", digits["search"].source, digits["search"].indices[:40], digits["search"].settings)
    division = uniform(3, 20)
    noise = FixedNoise(denoiser, split, [division.served(i) for i in range(3)], LossSettings(draws=2), batch_size=32)
    loaders: list[Callable[[], nn.Module]] = [lambda e=e: e for e in experts]  # type: ignore[misc]
    return FixedNoiseObjective(noise, denoiser.module, loaders, materialise), noise


def expert_of(denoiser: DDPM, seed: int) -> nn.Module:
    expert = make_pico_denoiser().module
    expert.load_state_dict(denoiser.module.state_dict())
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        expert.conv_out.weight.add_(torch.randn(expert.conv_out.weight.shape, generator=random), alpha=0.3)
        expert.conv_out.bias.add_(torch.randn(expert.conv_out.bias.shape, generator=random), alpha=0.3)
    return expert.eval()


def test_quadratic_predicts_the_loss_of_a_model_that_is_linear_in_w(linear: Experts) -> None:
    objective, noise = linear
    a, b = objective.normal_equations()
    np.testing.assert_allclose(a, a.T)
    assert np.linalg.eigvalsh(a).min() > 0
    at_zero = objective.value([0.0, 0.0, 0.0])
    elements = int(np.prod(noise.denoiser.sample_shape))
    for w in ([0.5, 0.0, 0.0], [0.2, -0.4, 0.7], [1.0, 1.0, 1.0]):
        # The loss is a mean over elements, the equations are sums over them.
        change = (np.array(w) @ a @ np.array(w) - 2 * b @ np.array(w)) / elements
        assert objective.value(w) - at_zero == pytest.approx(change, rel=1e-4, abs=1e-6)


def test_least_squares_weights_are_the_least_loss_among_perturbations(linear: Experts) -> None:
    objective, _ = linear
    w = least_squares_weights(*objective.normal_equations(), ridge=0.0)
    least = objective.value(w)
    assert np.abs(w).max() > 1e-3
    for i, step in itertools.product(range(3), (-0.05, 0.05)):
        assert objective.value([x + step * (i == j) for j, x in enumerate(w)]) > least
    assert least < min(objective.value(c.weights) for c in always(3))


def test_ranges_weigh_by_the_timesteps_that_they_hold(linear: Experts) -> None:
    objective, noise = linear
    losses = [1.0, 2.0, 4.0]  # ranges of 7, 7 and 6 timesteps
    assert noise.overall(losses) == pytest.approx((7 * 1.0 + 7 * 2.0 + 6 * 4.0) / 20)
    whole = objective.normal_equations()
    parts = []
    for runs in noise.ranges:
        one = FixedNoise(noise.denoiser, noise.split, [runs], noise.settings, noise.batch_size)
        parts.append(
            FixedNoiseObjective(one, objective.base, objective.experts, objective.materialise).normal_equations()
        )
    for i in range(2):
        np.testing.assert_allclose(whole[i], (7 * parts[0][i] + 7 * parts[1][i] + 6 * parts[2][i]) / 20, rtol=1e-10)


@pytest.mark.parametrize("batch_size", [7, 40])
def test_normal_equations_do_not_depend_on_the_batch_size(linear: Experts, batch_size: int) -> None:
    objective, noise = linear
    other = FixedNoise(noise.denoiser, noise.split, noise.ranges, noise.settings, batch_size)
    found = FixedNoiseObjective(other, objective.base, objective.experts, objective.materialise).normal_equations()
    for ours, theirs in zip(found, objective.normal_equations(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


# candidates


def test_zero_uniform_and_every_one_hot_are_always_proposed() -> None:
    settings = MergeSettings(search="none")
    assert [c.weights for c in candidates(3, settings, never)] == [
        [0.0, 0.0, 0.0],
        [1 / 3, 1 / 3, 1 / 3],
        [1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0],
        [0.0, 0.0, 1.0],
    ]


def test_one_expert_alone_is_proposed_once() -> None:
    assert [c.weights for c in candidates(1, MergeSettings(search="none"), never)] == [[0.0], [1.0]]


@pytest.mark.parametrize("search", ["grid", "least_squares"])
def test_every_search_holds_what_is_always_proposed_and_no_point_twice(search: str) -> None:
    settings = MergeSettings.model_validate(
        {"search": search, "grid_values": (0.0, 0.5, 1.0), "scales": (0.0, 1.0, 1.0), "ridge": 0.0}
    )
    proposals = candidates(2, settings, lambda: Quadratic(np.eye(2), np.array([0.5, 0.25])))
    points = [tuple(c.weights) for c in proposals]
    assert len(set(points)) == len(points)
    assert [c.source for c in proposals[:4]] == ["w = 0", "uniform", "one-hot 0", "one-hot 1"]
    extra = {(0.5, 0.25)} if search == "least_squares" else {(0.0, 0.5), (0.5, 0.0), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0)}
    assert set(points[4:]) == extra


def test_multiples_are_the_same_model_where_only_ratios_count() -> None:
    settings = MergeSettings(search="grid", grid_values=(-0.3, 0.0, 0.1, 0.3))
    space = Space(2, None, default=(1.0, 1.0), relative=True)
    points = [tuple(c.weights) for c in candidates(2, settings, never, space=space)]
    assert points[:4] == [(0.0, 0.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)], "1 each is uniform"
    rest = [(-0.3, -0.3), (-0.3, 0.0), (-0.3, 0.1), (-0.3, 0.3), (0.0, -0.3), (0.1, -0.3), (0.1, 0.3), (0.3, -0.3)]
    assert points[4:] == [*rest, (0.3, 0.1)]
    assert len(candidates(2, settings, never)) == 4 + 15, "elsewhere only the base is proposed twice"


def test_grid_has_every_combination() -> None:
    settings = MergeSettings(search="grid", grid_values=(0.0, 0.25, 0.5))
    points = {tuple(c.weights) for c in grid(3, settings)}
    assert len(points) == 27
    assert points == set(itertools.product((0.0, 0.25, 0.5), repeat=3))


def test_grid_above_max_evaluations_is_refused_before_anything_is_scored() -> None:
    settings = MergeSettings(search="grid", grid_values=(0.0, 0.5, 1.0), max_evaluations=26)
    with pytest.raises(UserError, match=r"grid: 32 candidates for 3 experts, more than merge\.max_evaluations=26"):
        candidates(3, settings, never)
    enough = settings.model_copy(update={"max_evaluations": 32})
    assert len(candidates(3, enough, never)) == 28  # on the grid, and uniform; points that both propose are scored once


def test_least_squares_scales_are_multiples_of_its_weights() -> None:
    settings = MergeSettings(scales=(0.5, 2.0), ridge=0.0)
    proposals = candidates(2, settings, lambda: Quadratic(np.diag([1.0, 2.0]), np.array([0.25, 1.0])))
    assert [c.weights for c in proposals[-2:]] == [[0.125, 0.25], [0.5, 1.0]]
    assert [c.source for c in proposals[-2:]] == ["least squares x 0.5", "least squares x 2"]


# scoring


def test_every_candidate_is_scored_in_its_place() -> None:
    proposals, objective = list(always(2)), Counting([1.0, 0.0])
    trials = list(score(proposals, objective))
    assert objective.asked == [[0.0, 0.0], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    assert [trial.value for trial in trials] == [1.0, 0.5, 0.0, 2.0]
    assert [trial.source for trial in trials] == [c.source for c in proposals]


def test_scoring_is_lazy_so_that_an_interruption_loses_one_trial_at_most() -> None:
    objective = Counting([0.0])
    trials = score([Candidate([float(i)], "") for i in range(5)], objective)
    assert next(trials).value == 0.0
    assert objective.asked == [[0.0]]


def test_best_is_the_least_and_of_equals_the_first() -> None:
    trials = [Trial([0.0], "w = 0", 2.0), Trial([0.5], "a", 1.0), Trial([1.0], "b", 1.0), Trial([2.0], "c", 3.0)]
    assert best(trials).source == "a"
    assert best([Trial([0.0], "w = 0", 1.0), *trials]).source == "w = 0"


def test_uniform_weights_sum_to_one() -> None:
    assert uniform_weights(4) == [0.25] * 4


# the report split


def test_report_split_is_refused_by_name_and_by_both_objectives(digits: dict[SplitName, Split]) -> None:
    denoiser, report = make_pico_denoiser(), digits["report"]
    noise = FixedNoise(denoiser, report, [[[0, 20]]], LossSettings())
    extractor = SmallClassifier(1, 4, 4, 10)
    for asking in (
        lambda: refuse_report(report),
        lambda: FixedNoiseObjective(noise, denoiser.module, [], lambda w: denoiser.module),
        lambda: FrechetObjective(denoiser, lambda w: denoiser.module, report, extractor, SamplerSettings(), 0, 8),
    ):
        with pytest.raises(UserError, match="only for the table"):
            asking()
    refuse_report(digits["search"])


# a search as a stage


@pytest.fixture(scope="module")
def trained(pico_store: tuple[Recipe, Store]) -> tuple[Stages, Node]:
    """The pico recipe with its experts trained; its search is still to do."""
    recipe, store = pico_store
    graph = Graph(recipe)
    stages = Stages(graph, store)
    for node in graph.needed(graph.experts[0]):
        store.produce(node.key, stages.make(node))
    return stages, graph.searches[0]


@pytest.fixture(scope="module")
def pico_store(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> tuple[Recipe, Store]:
    from conftest import make_pico_values

    values = make_pico_values(pico_pipeline)
    return Recipe.model_validate(values), Store(tmp_path_factory.mktemp("search") / "store")


def test_interrupted_search_goes_on_to_the_result_of_an_uninterrupted_one(
    trained: tuple[Stages, Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, node = trained
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    real, asked = objectives.FrechetObjective.value, list[list[float]]()

    def counting(self: FrechetObjective, weights: Given) -> float:
        asked.append(list(MergeWeights.of(weights).values))
        return real(self, weights)

    def interrupted(self: FrechetObjective, weights: Given) -> float:
        if len(asked) == 3:
            raise KeyboardInterrupt
        return counting(self, weights)

    for folder in (whole, parts):
        folder.mkdir()
    monkeypatch.setattr(objectives.FrechetObjective, "value", counting)
    result = stages.make(node)(whole)
    everything = list(asked)
    assert len(everything) == 5  # w = 0, uniform, two one-hots, least squares

    asked.clear()
    monkeypatch.setattr(objectives.FrechetObjective, "value", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages.make(node)(parts)
    monkeypatch.setattr(objectives.FrechetObjective, "value", counting)
    assert stages.make(node)(parts) == result
    assert asked == everything
    assert (parts / "search.json").read_bytes() == (whole / "search.json").read_bytes()
    assert (parts / "search.jsonl").read_bytes() == (whole / "search.jsonl").read_bytes()


def test_search_returns_its_best_trial_and_says_what_it_was_measured_by(
    trained: tuple[Stages, Node], tmp_path: Path
) -> None:
    stages, node = trained
    result = stages.make(node)(tmp_path)
    assert result is not None
    found = json.loads((tmp_path / "search.json").read_text())
    trials = [Trial(**trial) for trial in found["trials"]]
    assert (result["weights"], result["source"]) == (best(trials).weights, best(trials).source)
    assert result["objective"] == "FD(digits-cnn) DDIM-2, 16 images, search split"
    assert found["weights"] == result["weights"]


def test_kid_judges_without_the_bias_of_few_images() -> None:
    """Two halves of one set: FD of so few images is far from 0, KID is not; and it is the metric's own."""
    rng = np.random.Generator(np.random.Philox(0))
    real, generated = rng.standard_normal((2, 40, 64))
    objective = object.__new__(KernelObjective)
    objective.seed = 0
    objective.features = lambda weights: generated  # type: ignore[method-assign]
    objective.judge(real)
    assert objective.value([0.0]) == kernel_distance(generated, real, seed=0)[0]
    assert abs(objective.value([0.0])) < 0.5 < 10 < frechet_distance(statistics(generated), statistics(real))
    assert shaping(MergeSettings(judge="kid")) == {**shaping(MergeSettings()), "judge": "kid"}
