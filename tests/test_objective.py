"""Targets, losses and weightings against closed forms; the fixed-noise loss; the sampling of timesteps (Eq. 2, 4-6)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import T, make_pico_denoiser
from deme_diffusion.config import AugmentSettings, DataSettings, DecoupleSettings, LossSettings
from deme_diffusion.data.loading import Batch, Order, steps
from deme_diffusion.data.splits import Split, SplitName, load_splits
from deme_diffusion.decoupling.step import Job, TrainStep
from deme_diffusion.decoupling.timesteps import draw_timesteps
from deme_diffusion.division import Runs, from_runs, reported, uniform, whole
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.denoiser import Noised
from deme_diffusion.models.objective import FixedNoise, consistency_loss, denoising_loss
from deme_diffusion.models.weighting import min_snr_weights


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- targets ------------------------------------------------------------------------------------------------------


def forward_process(denoiser: DDPM, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t and sigma_t of each sample, (b, 1, 1, 1), from the betas alone."""
    betas = np.linspace(denoiser.scheduler.config.beta_start, denoiser.scheduler.config.beta_end, T)
    alphas = torch.tensor(np.cumprod(1 - betas), dtype=torch.float32)[t].reshape(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_what_the_prediction_type_says(prediction_type: str) -> None:
    denoiser = make_pico_denoiser(prediction_type=prediction_type)
    clean, noise, t = normal(0, 3, 1, 8, 8), normal(1, 3, 1, 8, 8), torch.tensor([0, 7, T - 1])
    noised = denoiser.noised({"image": clean}, t, noise)
    alpha, sigma = forward_process(denoiser, t)
    expected = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[prediction_type]
    torch.testing.assert_close(noised.x_t, alpha * clean + sigma * noise, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(noised.target, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(noised.t, t)


def test_snr_is_the_ratio_of_the_forward_process(pico_denoiser: DDPM) -> None:
    alpha, sigma = forward_process(pico_denoiser, torch.arange(T))
    torch.testing.assert_close(pico_denoiser.snr(), (alpha / sigma).square().flatten().double(), rtol=1e-4, atol=0)


# --- losses -------------------------------------------------------------------------------------------------------


def test_the_denoising_loss_is_a_mean_over_elements_for_each_sample() -> None:
    prediction = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]])
    target = torch.tensor([[[[0.0, 0.0]]], [[[0.0, 4.0]]]])
    assert denoising_loss(prediction, target).tolist() == [2.5, 8.0]


def test_losses_are_summed_in_float32_under_half_precision() -> None:
    prediction = torch.full((1, 1, 4, 4), 300.0, dtype=torch.float16)  # its square overflows float16
    assert denoising_loss(prediction, torch.zeros_like(prediction)).tolist() == [90000.0]


def test_the_consistency_loss_sends_no_gradient_to_the_teacher() -> None:
    student, teacher = normal(0, 2, 3).requires_grad_(), normal(1, 2, 3).requires_grad_()
    consistency_loss(student, teacher).sum().backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / 3)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_denoising_and_consistency_are_one_regression(weight: float) -> None:
    """METHOD.md section 9: the same gradient as one residual; the values differ by a constant of the parameters."""
    model, x = nn.Linear(5, 4).double(), normal(0, 6, 5).double()
    eps, teacher = normal(1, 6, 4).double(), normal(2, 6, 4).double()

    def squares(residual: torch.Tensor) -> torch.Tensor:
        return residual.square().sum()

    two = squares(model(x) - eps) + weight * squares(teacher - model(x))
    one = (1 + weight) * squares(model(x) - (eps + weight * teacher) / (1 + weight))
    constant = weight / (1 + weight) * squares(eps - teacher)
    torch.testing.assert_close(two, one + constant, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(two, list(model.parameters())), torch.autograd.grad(one, list(model.parameters())),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# --- the training step --------------------------------------------------------------------------------------------


def one_batch(split: Split, *, size: int = 8, step: int = 0) -> Batch:
    """The first micro-batch of a step."""
    return next(iter(steps(split, Order(size), seed=3, start=step, stop=step + 1)))[0]


def job(**options: Any) -> Job:
    """An expert of [0, 10) by default."""
    settings = DecoupleSettings(**{k: options.pop(k) for k in ("snr_gamma",) if k in options})
    values: dict[str, Any] = {"subset": [[0, 10]], "steps": 4, "learning_rate": 1e-3, "seed": 3, **options}
    return Job("expert", settings, **values)


def test_the_step_adds_the_weighted_consistency_loss_to_the_denoising_loss(digits: dict[SplitName, Split]) -> None:
    student, teacher = make_pico_denoiser(seed=1), make_pico_denoiser(seed=2).module
    batch = one_batch(digits["train"])
    step = TrainStep(student, job(consistency_weight=0.5, global_prob=0.5), torch.device("cpu"))
    loss, parts = step(student.module, teacher, batch)

    t = torch.from_numpy(
        draw_timesteps(student, np.arange(10), global_prob=0.5, seed=3, step=0, first=0, count=8)
    )  # fmt: skip
    noised = student.noised(batch, t, batch["noise"])
    own, other = (module(noised.x_t, t).sample for module in (student.module, teacher))
    denoising = (own - batch["noise"]).square().mean((1, 2, 3))
    consistency = (own - other).square().mean((1, 2, 3))
    torch.testing.assert_close(parts.denoising, denoising.detach())
    torch.testing.assert_close(parts.consistency, consistency.detach())
    torch.testing.assert_close(loss, (denoising + 0.5 * consistency).mean())
    assert parts.consistency.min() > 0


def test_losses_are_told_apart_by_the_range_that_each_sample_fell_in(digits: dict[SplitName, Split]) -> None:
    denoiser = make_pico_denoiser()
    step = TrainStep(denoiser, job(global_prob=1.0), torch.device("cpu"))
    _, parts = step(denoiser.module, None, one_batch(digits["train"], size=32))
    t = draw_timesteps(denoiser, np.arange(10), global_prob=1.0, seed=3, step=0, first=0, count=32)
    assert parts.owner.tolist() == [0 if at < 10 else 1 for at in t]  # its own subset, and the rest
    for index, value in parts.by_range().items():
        assert value == pytest.approx(float(parts.denoising[parts.owner == index].mean()))
    assert set(parts.by_range()) == {0, 1}


def test_combine_is_handed_shares_that_sum_to_the_mean_loss(digits: dict[SplitName, Split]) -> None:
    denoiser, handed = make_pico_denoiser(), {}

    def combine(losses: dict[int, torch.Tensor]) -> torch.Tensor:
        handed.update({index: loss.item() for index, loss in losses.items()})
        return 10 * losses[1]

    step = TrainStep(denoiser, job(global_prob=1.0), torch.device("cpu"), combine)
    loss, parts = step(denoiser.module, None, one_batch(digits["train"], size=32))
    assert sum(handed.values()) == pytest.approx(float(parts.loss.mean()), rel=1e-6)
    assert loss.item() == pytest.approx(10 * handed[1])


def test_min_snr_weighs_each_sample_by_its_own_timestep(digits: dict[SplitName, Split]) -> None:
    denoiser, batch = make_pico_denoiser(), one_batch(digits["train"])
    weighted = TrainStep(denoiser, job(snr_gamma=0.5), torch.device("cpu"))
    _, parts = weighted(denoiser.module, None, batch)
    t = draw_timesteps(denoiser, np.arange(10), global_prob=0.0, seed=3, step=0, first=0, count=8)
    weights = (0.5 / denoiser.snr()[t]).clamp(max=1).float()
    assert len(set(weights.tolist())) > 1
    torch.testing.assert_close(parts.loss, weights * parts.denoising)


@pytest.mark.parametrize(
    "prediction_type, expected",
    [
        ("epsilon", [1.0, 1.0, 1.0, 0.5]),
        ("v_prediction", [0.0, 1 / 2, 5 / 6, 5 / 11]),
        ("sample", [0.0, 1.0, 5.0, 5.0]),
    ],
)
def test_min_snr_weights_by_hand_with_an_snr_of_zero(prediction_type: str, expected: list[float]) -> None:
    weights = min_snr_weights(torch.tensor([0.0, 1.0, 5.0, 10.0]), 5.0, prediction_type)
    torch.testing.assert_close(weights, torch.tensor(expected))


# --- the fixed-noise loss -----------------------------------------------------------------------------------------

HALVES: list[Runs] = [[[0, 10]], [[10, T]]]


@pytest.fixture(scope="module")
def few() -> Split:
    """Thirty held-out images."""
    split = load_splits(DataSettings())["search"]
    return replace(split, indices=split.indices[:30])


def fixed(denoiser: DDPM, split: Split, ranges: list[Runs] = HALVES, **options: Any) -> FixedNoise:
    """Two draws an image."""
    batch_size = options.pop("batch_size", 256)
    return FixedNoise(denoiser, split, ranges, LossSettings(**{"draws": 2, **options}), batch_size)


def test_the_fixed_noise_loss_is_the_same_twice_whatever_the_global_generator(pico_denoiser: DDPM, few: Split) -> None:
    torch.manual_seed(0)
    first = fixed(pico_denoiser, few).losses(pico_denoiser.module)
    torch.manual_seed(1)
    assert fixed(pico_denoiser, few).losses(pico_denoiser.module) == first


def test_the_fixed_noise_loss_does_not_depend_on_the_batch_size(pico_denoiser: DDPM, few: Split) -> None:
    whole_batches = fixed(pico_denoiser, few).losses(pico_denoiser.module)
    for batch_size in (1, 7, 30):
        losses = fixed(pico_denoiser, few, batch_size=batch_size).losses(pico_denoiser.module)
        assert losses == pytest.approx(whole_batches, rel=1e-6)


def test_the_points_of_a_range_do_not_depend_on_its_place_in_the_list(pico_denoiser: DDPM, few: Split) -> None:
    forward = fixed(pico_denoiser, few).losses(pico_denoiser.module)
    assert fixed(pico_denoiser, few, HALVES[::-1]).losses(pico_denoiser.module) == forward[::-1]
    assert fixed(pico_denoiser, few, HALVES[1:]).losses(pico_denoiser.module) == forward[1:]


def test_another_seed_draws_other_points(pico_denoiser: DDPM, few: Split) -> None:
    one, two = (fixed(pico_denoiser, few, seed=seed).losses(pico_denoiser.module) for seed in (0, 1))
    assert one != two


def test_every_image_is_drawn_in_each_stratum_of_its_range(pico_denoiser: DDPM, few: Split) -> None:
    for lo, hi in ((0, 10), (10, T)):
        noised = list(fixed(pico_denoiser, few).batches([[lo, hi]], torch.device("cpu")))
        first, second = (part.t for part in noised)
        assert len(first) == len(second) == len(few)
        middle = (lo + hi) // 2
        assert set(first.tolist()) == set(range(lo, middle))
        assert set(second.tolist()) == set(range(middle, hi))


class Answering(nn.Module):
    """A component that predicts nothing but a number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.dummy = value, nn.Parameter(torch.zeros(1))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (torch.full_like(x_t, self.value),)


def test_the_fixed_noise_loss_is_the_mean_square_to_the_true_target(pico_denoiser: DDPM, few: Split) -> None:
    measure = fixed(pico_denoiser, few)
    (loss, _) = measure.losses(Answering(0.5))
    targets = torch.cat([noised.target for noised in measure.batches(HALVES[0], torch.device("cpu"))]).double()
    assert loss == pytest.approx(float((0.5 - targets).square().mean()), rel=1e-6)
    assert targets.std() == pytest.approx(1.0, abs=0.05)  # it is noise


def test_the_overall_loss_weighs_ranges_by_their_timesteps(pico_denoiser: DDPM, few: Split) -> None:
    measure = fixed(pico_denoiser, few, [[[0, 5]], [[5, 6], [8, T]]])
    assert measure.overall([1.0, 3.0]) == pytest.approx((5 * 1.0 + 13 * 3.0) / 18)


def test_held_out_views_are_what_is_measured(pico_denoiser: DDPM, few: Split) -> None:
    warped = replace(few, settings=DataSettings(augment=AugmentSettings(shift=2.0), views=2))
    plain, views = (list(fixed(pico_denoiser, s).batches([[0, 1]], torch.device("cpu"))) for s in (few, warped))

    def clean(noised: Noised) -> torch.Tensor:
        """The image back from x_t; all of them stand at t = 0."""
        alpha, sigma = forward_process(pico_denoiser, noised.t)
        return (noised.x_t - sigma * noised.target) / alpha

    torch.testing.assert_close(clean(plain[0]), clean(plain[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(clean(views[1]), warped.view(1), rtol=0, atol=1e-4)
    assert (clean(views[0]) - clean(views[1])).abs().max() > 0.1


# --- the sampling of timesteps ------------------------------------------------------------------------------------

OWN = from_runs([[2, 4], [9, 12]])
MANY = 20_000


def drawn(denoiser: DDPM, global_prob: float, **options: Any) -> np.ndarray:
    """Timesteps of one step."""
    values: dict[str, Any] = {"seed": 0, "step": 0, "first": 0, "count": MANY, **options}
    return draw_timesteps(denoiser, options.pop("subset", OWN), global_prob=global_prob, **values)


def assert_uniform(draws: np.ndarray, over: np.ndarray) -> None:
    """Counts over exactly these timesteps pass a chi-square test at 1e-6."""
    from scipy.stats import chisquare

    values, counts = np.unique(draws, return_counts=True)
    np.testing.assert_array_equal(values, over)
    assert chisquare(counts).pvalue > 1e-6


def test_p_zero_draws_uniformly_from_a_subset_with_holes_and_nowhere_else(pico_denoiser: DDPM) -> None:
    assert_uniform(drawn(pico_denoiser, 0.0), OWN)


def test_p_one_draws_uniformly_from_all_timesteps(pico_denoiser: DDPM) -> None:
    assert_uniform(drawn(pico_denoiser, 1.0), np.arange(T))


def test_p_is_the_share_that_is_drawn_from_everywhere(pico_denoiser: DDPM) -> None:
    draws = drawn(pico_denoiser, 0.3)
    outside = ~np.isin(draws, OWN)
    expected = 0.3 * (1 - len(OWN) / T)
    assert abs(outside.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / MANY)
    assert_uniform(draws[outside], np.setdiff1d(np.arange(T), OWN))
    assert_uniform(draws[~outside], OWN)


def test_timesteps_are_keyed_by_sample_so_that_batch_boundaries_do_not_matter(pico_denoiser: DDPM) -> None:
    together = drawn(pico_denoiser, 0.3, count=50)
    apart = [drawn(pico_denoiser, 0.3, first=a, count=b - a) for a, b in ((0, 1), (1, 30), (30, 50))]
    np.testing.assert_array_equal(together, np.concatenate(apart))


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}])
def test_each_part_of_the_key_changes_the_timesteps(pico_denoiser: DDPM, other: dict[str, int]) -> None:
    one, two = drawn(pico_denoiser, 0.3, count=500), drawn(pico_denoiser, 0.3, count=500, **other)
    assert (one != two).mean() > 0.5


# --- the ranges that a training is reported by --------------------------------------------------------------------


@pytest.mark.parametrize("subset", [whole(T), [[0, 10]], [[2, 4], [9, 12]], uniform(8, T).subset(3)])
def test_reported_ranges_cover_every_timestep_once(subset: Runs) -> None:
    covered = np.concatenate([from_runs(runs) for runs in reported(subset, T)])
    np.testing.assert_array_equal(np.sort(covered), np.arange(T))
    if subset != whole(T):
        assert reported(subset, T)[0] == subset
