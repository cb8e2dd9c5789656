"""Loss weightings against closed forms, in the units of every prediction type, and at the ends of a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import make_pico_denoiser, pico_pretrain
from deme_diffusion.config import DataSettings, DecoupleSettings, PretrainSettings, RuntimeSettings, TrainSettings
from deme_diffusion.data.loading import Order, steps
from deme_diffusion.data.splits import Split, SplitName, load_splits
from deme_diffusion.decoupling.step import Job, TrainStep
from deme_diffusion.decoupling.timesteps import draw_timesteps
from deme_diffusion.decoupling.train import train
from deme_diffusion.division import whole
from deme_diffusion.errors import UserError
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.weighting import (
    min_snr_weights,
    p2_weights,
    snr_plus_one_weights,
    timestep_weights,
    truncated_snr_weights,
)

T = 20
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SNR = torch.tensor([0.01, 0.5, 1.0, 3.0, 400.0], dtype=torch.float64)
SETTINGS: dict[str, dict[str, Any]] = {
    "snr_plus_one": {},
    "truncated_snr": {},
    "min_snr": {"snr_gamma": 0.7},
    "p2": {"p2_gamma": 0.5, "p2_k": 2.0},
}
# What each weighs the x0 error with, written from the papers.
ON_X0: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "snr_plus_one": lambda snr: snr + 1,
    "truncated_snr": lambda snr: snr.clamp(min=1),
    "min_snr": lambda snr: snr.clamp(max=0.7),
    "p2": lambda snr: snr / (2 + snr).sqrt(),
}


def settings(weighting: str, **options: Any) -> DecoupleSettings:
    return DecoupleSettings.model_validate({"loss_weighting": weighting, **SETTINGS.get(weighting, {}), **options})


def given(denoiser: DDPM, options: TrainSettings) -> torch.Tensor:
    weights = timestep_weights(options, denoiser)
    assert weights is not None
    return weights


class Answers(DDPM):
    """A pico model of a given SNR."""

    def __init__(self, snr: torch.Tensor, prediction_type: str) -> None:
        denoiser = make_pico_denoiser(prediction_type=prediction_type)
        super().__init__(denoiser.module, denoiser.scheduler)
        self.given = snr

    def snr(self) -> torch.Tensor:
        return self.given


# --- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", SETTINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_weighting_is_the_paper_s_in_the_units_of_the_prediction(weighting: str, prediction_type: str) -> None:
    divisor = {"epsilon": SNR, "v_prediction": SNR + 1, "sample": torch.ones_like(SNR)}[prediction_type]
    weights = given(Answers(SNR, prediction_type), settings(weighting))
    torch.testing.assert_close(weights, ON_X0[weighting](SNR) / divisor, rtol=1e-12, atol=0)


def test_weights_worked_by_hand() -> None:
    snr = torch.tensor([0.25, 4.0], dtype=torch.float64)
    assert snr_plus_one_weights(snr, "epsilon").tolist() == [5.0, 1.25]
    assert snr_plus_one_weights(snr, "v_prediction").tolist() == [1.0, 1.0]
    assert snr_plus_one_weights(snr, "sample").tolist() == [1.25, 5.0]
    assert truncated_snr_weights(snr, "epsilon").tolist() == [4.0, 1.0]
    assert truncated_snr_weights(snr, "v_prediction").tolist() == [0.8, 0.8]
    assert truncated_snr_weights(snr, "sample").tolist() == [1.0, 4.0]
    assert min_snr_weights(snr, 2.0, "epsilon").tolist() == [1.0, 0.5]
    assert p2_weights(snr, 1.0, 1.0, "epsilon").tolist() == [0.8, 0.2]
    assert p2_weights(snr, 2.0, 1.0, "epsilon").tolist() == pytest.approx([0.64, 0.04])
    assert p2_weights(snr, 1.0, 1.0, "v_prediction").tolist() == pytest.approx([0.16, 0.16])
    assert p2_weights(snr, 1.0, 1.0, "sample").tolist() == pytest.approx([0.2, 0.8])


def test_without_a_weighting_there_are_no_weights_and_snr_gamma_alone_is_min_snr() -> None:
    denoiser = make_pico_denoiser()
    assert timestep_weights(DecoupleSettings(), denoiser) is None
    alone = given(denoiser, DecoupleSettings(snr_gamma=0.5))
    assert torch.equal(alone, given(denoiser, DecoupleSettings(loss_weighting="min_snr", snr_gamma=0.5)))
    assert torch.equal(alone, min_snr_weights(denoiser.snr(), 0.5, "epsilon"))
    five = given(denoiser, DecoupleSettings(loss_weighting="min_snr"))
    assert torch.equal(five, given(denoiser, DecoupleSettings(snr_gamma=5.0)))


@pytest.mark.parametrize("weighting", SETTINGS)
def test_the_same_answer_gives_the_same_weighted_loss_and_gradient_whatever_is_predicted(weighting: str) -> None:
    """A model linear in its parameters answers with x0; the other predictions follow from it and x_t."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, T, 6, generator=generator, dtype=torch.float64)
    model, losses, gradients = nn.Linear(6, 6).double(), [], []
    for prediction_type in PREDICTIONS:
        denoiser = make_pico_denoiser(prediction_type=prediction_type)
        bar = denoiser.scheduler.alphas_cumprod.double()[:, None]
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        x_t = alpha * clean + sigma * noise
        x0 = model(x_t)
        eps = (x_t - alpha * x0) / sigma
        answer = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[prediction_type]
        target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[prediction_type]
        loss = (given(denoiser, settings(weighting))[:, None] * (answer - target).square()).mean()
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, model.weight)[0])
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)  # the schedule itself is in float32
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=1e-8)


# --- an SNR of 0 and of infinity ----------------------------------------------------------------------------------

ENDS = torch.tensor([torch.inf, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "weighting, prediction_type, expected",
    [
        ("snr_plus_one", "v_prediction", [1.0, 1.0]),
        ("truncated_snr", "v_prediction", [1.0, 1.0]),
        ("min_snr", "epsilon", [0.0, 1.0]),
        ("min_snr", "v_prediction", [0.0, 0.0]),
        ("min_snr", "sample", [0.7, 0.0]),
        ("p2", "epsilon", [0.0, 2**-0.5]),
        ("p2", "v_prediction", [0.0, 0.0]),
    ],
)
def test_at_the_ends_of_a_schedule_a_weight_is_its_finite_limit(
    weighting: str, prediction_type: str, expected: list[float]
) -> None:
    weights = given(Answers(ENDS, prediction_type), settings(weighting))
    assert weights[[0, 2]].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("gamma, limit", [(1.0, 1.0), (2.0, 0.0)])
def test_p2_of_a_predicted_image_without_noise(gamma: float, limit: float) -> None:
    assert p2_weights(ENDS, gamma, 1.0, "sample")[[0, 2]].tolist() == [limit, 0.0]


@pytest.mark.parametrize(
    "weighting, prediction_type, snr, at",
    [
        ("snr_plus_one", "epsilon", [3.0, 1.0, 0.0], 2),
        ("truncated_snr", "epsilon", [3.0, 1.0, 0.0], 2),
        ("snr_plus_one", "sample", [torch.inf, 1.0, 0.1], 0),
        ("truncated_snr", "sample", [torch.inf, 1.0, 0.1], 0),
        ("p2", "sample", [torch.inf, 1.0, 0.1], 0),
    ],
)
def test_an_infinite_weight_is_refused_with_its_timestep_and_what_to_use(
    weighting: str, prediction_type: str, snr: list[float], at: int
) -> None:
    denoiser = Answers(torch.tensor(snr, dtype=torch.float64), prediction_type)
    with pytest.raises(UserError, match=f"loss_weighting={weighting} .* t={at}, .*use loss_weighting=min_snr"):
        timestep_weights(settings(weighting), denoiser)
    assert given(denoiser, settings("min_snr")).isfinite().all()


def test_a_training_on_a_schedule_without_terminal_signal_is_refused_before_its_first_step(
    tmp_path: Path, digits: dict[SplitName, Split]
) -> None:
    scheduler = {**pico_pretrain().scheduler.model_dump(), "rescale_betas_zero_snr": True}
    denoiser = make_pico_denoiser()
    denoiser.scheduler = type(denoiser.scheduler).from_config(scheduler)
    assert denoiser.snr()[-1] == 0
    job = Job("expert 0", settings("truncated_snr", train_batch_size=2), whole(T), 1, 1e-3, 0)
    with pytest.raises(UserError, match=f"t={T - 1}, where the SNR is 0 and the model predicts epsilon"):
        train(denoiser, digits["train"], job, tmp_path, runtime=RuntimeSettings(device="cpu"))


# --- in a training step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DecoupleSettings, PretrainSettings])
@pytest.mark.parametrize("weighting", SETTINGS)
def test_a_step_weighs_each_sample_by_its_own_timestep_in_experts_and_bases(
    weighting: str, kind: type[TrainSettings], digits: dict[SplitName, Split]
) -> None:
    denoiser, split = make_pico_denoiser(), digits["train"]
    options = kind.model_validate({"loss_weighting": weighting, **SETTINGS[weighting]})
    job = Job("one", options, whole(T), 1, 1e-3, 3)
    batch = next(iter(steps(split, Order(8), seed=3, start=0, stop=1)))[0]
    _, parts = TrainStep(denoiser, job, torch.device("cpu"))(denoiser.module, None, batch)
    t = draw_timesteps(denoiser, torch.arange(T).numpy(), global_prob=0.0, seed=3, step=0, first=0, count=8)
    weights = given(denoiser, options)[t].float()
    assert len(set(weights.tolist())) > 1
    torch.testing.assert_close(parts.loss, weights * parts.denoising)


def test_snr_gamma_alone_trains_the_same_weights_as_min_snr_by_name(tmp_path: Path) -> None:
    split = load_splits(DataSettings())["train"]
    images = replace(split, indices=split.indices[:16])
    for name in ("none", "min_snr"):
        options = settings(name, snr_gamma=0.5, train_batch_size=2)
        job = Job(name, options, whole(T), 2, 1e-2, 0)
        train(make_pico_denoiser(), images, job, tmp_path / name, runtime=RuntimeSettings(device="cpu"))
    one, two = (next((tmp_path / name / "unet").glob("*.safetensors")) for name in ("none", "min_snr"))
    assert one.read_bytes() == two.read_bytes()


def test_a_gamma_of_min_snr_with_another_weighting_is_refused() -> None:
    with pytest.raises(ValueError, match="snr_gamma is of min_snr"):
        DecoupleSettings(loss_weighting="p2", snr_gamma=5.0)
