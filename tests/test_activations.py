"""Activation differences: closed forms on toy modules, variation cleared of chance, and their picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import T, make_pico_denoiser
from deme_diffusion.analysis.activations import hidden_states, measure, places, variation, write_activations
from deme_diffusion.config import AnalyzeSettings, LossSettings
from deme_diffusion.data.splits import Split, SplitName
from deme_diffusion.errors import UserError
from deme_diffusion.figure_file import FigureData, read_figure, write_figure
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.report.drawing.activations import pictures
from deme_diffusion.report.figures import png_of, svg_of
from drawn import sizes_without_torch

Splits = dict[SplitName, Split]
CHANNELS = np.array([0.1, 0.2, 0.4, 0.1])
POSITIONS = np.linspace(0.1, 0.5, 64).reshape(8, 8)
RANGES = [[[0, 5]], [[5, T]]]


class Block(nn.Module):
    """Gives x times a gain (C, h, w), and, as U-Nets do, skip tensors with it."""

    def __init__(self, gain: torch.Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        return x * self.gain, (x,)


class Toy(nn.Module):
    """One block with a U-Net's forward."""

    def __init__(self, change: Any = 0.0, channels: int = 4) -> None:
        super().__init__()
        gain = torch.ones(channels, 8, 8) + torch.as_tensor(change, dtype=torch.float32)
        self.down_blocks = nn.ModuleList([Block(gain)])

    def forward(self, x: torch.Tensor, t: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        hidden, _ = self.down_blocks[0](x)
        return (hidden.mean(1, keepdim=True),)


def along_channels() -> Toy:
    """Each channel scaled by its own factor."""
    return Toy(CHANNELS[:, None, None])


def along_space() -> Toy:
    """Each position scaled by its own factor."""
    return Toy(POSITIONS[None])


def noise_of(splits: Splits, num_images: int = 12, batch_size: int = 5, draws: int = 2) -> FixedNoise:
    """Points on the digits in two subsets of different sizes."""
    settings = LossSettings(num_images=num_images, draws=draws)
    return FixedNoise(make_pico_denoiser(), splits["train"], RANGES, settings, batch_size)


def written(
    path: Path,
    splits: Splits,
    experts: list[Callable[[], nn.Module]],
    merged: Callable[[], nn.Module] | None = None,
    **points: int,
) -> FigureData:
    """The data of a figure of toys."""
    names = [f"expert {i}" for i in range(len(experts))]
    file = path / "activations.npz"
    options: Any = {"names": names, "served": RANGES}
    write_activations(file, noise_of(splits, **points), Toy(), experts, merged, AnalyzeSettings(), **options)
    return read_figure(file)


# --- closed forms -------------------------------------------------------------------------------------------------


def test_a_scaled_channel_and_a_scaled_position_differ_along_their_own_axis_only(
    tmp_path: Path, digits: Splits
) -> None:
    data = written(tmp_path, digits, [along_channels, along_space])
    change, base, relative = np.moveaxis(data.arrays["variations"][:, 0], 1, 0)
    expected = [[CHANNELS.std(ddof=1) / CHANNELS.mean(), 0], [0, POSITIONS.std(ddof=1) / POSITIONS.mean()]]
    np.testing.assert_allclose(relative, expected, atol=1e-6)
    assert change[0, 0] == pytest.approx(expected[0][0], rel=0.05)
    assert base[:, 0] == pytest.approx(0, abs=1e-3)  # all channels are the image
    shares = data.arrays["channels_0"] / data.arrays["base_channels_0"]
    np.testing.assert_allclose(shares[0], CHANNELS, rtol=1e-5)
    shares = data.arrays["positions_0"] / data.arrays["base_positions_0"]
    np.testing.assert_allclose(shares[1], POSITIONS, rtol=1e-5)
    np.testing.assert_allclose(data.arrays["sizes"][0], CHANNELS.mean(), rtol=1e-5)


def test_the_merged_model_sees_all_subsets_each_by_its_size(tmp_path: Path, digits: Splits) -> None:
    data = written(tmp_path, digits, [along_channels, along_channels], along_channels)
    noise = noise_of(digits)
    own = [measure(noise, runs, Toy(), [along_channels()], ["down_blocks.0"])[0][0] for runs in RANGES]
    change = sum(size / T * means.change.mean((0, 2)) for size, means in zip((5, 15), own, strict=True))
    base = sum(size / T * means.base.mean() for size, means in zip((5, 15), own, strict=True))
    np.testing.assert_allclose(data.arrays["channels_0"][2], change / base, rtol=1e-5)
    assert data.meta["models"] == ["expert 0", "expert 1", "merged"]


def test_on_subsets_that_overlap_the_merged_model_sees_every_timestep_once(tmp_path: Path, digits: Splits) -> None:
    noise = replace(noise_of(digits), ranges=[[[0, 8]], [[4, T]]])
    options: Any = {"names": ["expert 0", "expert 1"], "served": RANGES}
    experts, merged = [along_channels] * 2, along_channels
    write_activations(tmp_path / "a.npz", noise, Toy(), experts, merged, AnalyzeSettings(), **options)
    data, apart = read_figure(tmp_path / "a.npz"), written(tmp_path, digits, experts, merged)
    np.testing.assert_array_equal(data.arrays["base_positions_0"][2], apart.arrays["base_positions_0"][2])
    assert not np.array_equal(data.arrays["base_positions_0"][0], apart.arrays["base_positions_0"][0])


def test_batches_of_any_size_give_the_same_means(digits: Splits) -> None:
    means = [
        measure(noise_of(digits, batch_size=size), RANGES[0], Toy(), [along_space()], ["down_blocks.0"])[0][0]
        for size in (1, 5, 12, 256)
    ]
    for other in means[1:]:
        np.testing.assert_allclose(other.change, means[0].change, rtol=1e-5)
        np.testing.assert_allclose(other.base, means[0].base, rtol=1e-5)


def test_the_halves_are_of_different_images(digits: Splits) -> None:
    noise = noise_of(digits, num_images=2, draws=1, batch_size=1)
    means = measure(noise, RANGES[0], Toy(), [along_channels()], ["down_blocks.0"])[0][0]
    points = [noised.x_t[0].abs().flatten().numpy() for noised in noise.batches(RANGES[0], torch.device("cpu"))]
    np.testing.assert_allclose(means.base[:, 0], points, rtol=1e-6)


def test_an_expert_that_equals_the_base_has_zeros_and_no_variation(tmp_path: Path, digits: Splits) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = written(tmp_path, digits, [Toy, along_channels])
        (picture,) = pictures([data])
        assert len(svg_of(picture.draw, picture.width, picture.height)) > 1000
        nothing = written(tmp_path, digits, [Toy, Toy])
        (picture,) = pictures([nothing])
        assert png_of(picture.draw, picture.width, picture.height).startswith(b"\x89PNG")
    assert not data.arrays["channels_0"][0].any()
    assert np.isnan(data.arrays["variations"][0, 0, [0, 2]]).all()
    assert np.isfinite(data.arrays["variations"][1]).all()
    assert data.meta["medians"][0]["change channels"] is None
    assert "No variation" in picture.caption


def test_a_real_unet_is_watched_at_the_papers_places(tmp_path: Path, digits: Splits) -> None:
    noise, other = noise_of(digits), make_pico_denoiser(seed=1)
    base = noise.denoiser.module
    found = write_activations(
        tmp_path / "a.npz",
        noise,
        base,
        [lambda: other.module, lambda: base],
        lambda: other.module,
        AnalyzeSettings(),
        served=RANGES,
        names=["one", "two"],
    )
    data = read_figure(tmp_path / "a.npz")
    assert data.meta["places"] == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert data.arrays["positions_2"].shape == (3, 4, 4)
    assert found == data.meta["medians"][2]
    assert found["size"] > 0.1
    assert not any(part._forward_hooks for part in base.modules())


# --- places and outputs -------------------------------------------------------------------------------------------


def test_places_of_other_networks_are_their_outermost_blocks() -> None:
    inner = nn.ModuleDict({"blocks": nn.ModuleList([nn.Identity()])})
    transformer = nn.ModuleDict({"transformer_blocks": nn.ModuleList([inner, nn.Identity()]), "norm": nn.Identity()})
    assert places(transformer) == ["transformer_blocks.0", "transformer_blocks.1"]
    with pytest.raises(UserError, match="Linear has no blocks"):
        places(nn.Linear(2, 2))


def test_hidden_states_come_first_and_tokens_lie_last() -> None:
    image, tokens = torch.zeros(2, 3, 4, 5), torch.zeros(2, 7, 3, dtype=torch.bfloat16)
    assert hidden_states(nn.Identity(), (image, (tokens,))) is image
    assert hidden_states(nn.Identity(), tokens).shape == (2, 3, 7)
    assert hidden_states(nn.Identity(), tokens).dtype == torch.float32


def test_another_architecture_is_named(tmp_path: Path, digits: Splits) -> None:
    with pytest.raises(UserError, match=r"down_blocks.0: gives \(5, 8, 8\), the base's \(4, 8, 8\)"):
        written(tmp_path, digits, [lambda: Toy(channels=5)])


# --- variation ----------------------------------------------------------------------------------------------------


def planted(seed: int, channels: float, positions: float, rest: float, noise: float) -> Any:
    """Means (2, 48, 256) around 1 with known standard deviations; the noise is each half's own."""
    rng = np.random.default_rng(seed)
    draws = {"c": rng.normal(size=(48, 1)), "p": rng.normal(size=256), "rest": rng.normal(size=(48, 256))}
    own = (
        noise * rng.normal(size=(2, 48, 256))
        + noise * rng.normal(size=(2, 48, 1))
        + noise * rng.normal(size=(2, 1, 256))
    )
    return 1 + channels * draws["c"] + positions * draws["p"] + rest * draws["rest"] + own


def test_variation_finds_what_was_planted_under_noise() -> None:
    found = np.array([variation(planted(seed, 0.3, 0.1, 0.4, 0.05), (16, 16)) for seed in range(20)])
    np.testing.assert_allclose(found.mean(0), [0.3, 0.1], rtol=0.1)


def test_chance_is_no_variation_though_means_over_fewer_entries_vary_more() -> None:
    halves = planted(0, 0.0, 0.0, 1.0, 0.0)
    plain = [halves.mean(axis).std() for axis in ((0, 2), (0, 1))]
    found = [variation(planted(seed, 0.0, 0.0, 1.0, 0.0), (16, 16)) for seed in range(20)]
    assert plain[1] > 2 * plain[0]
    variances = (np.sign(found) * np.square(found)).mean(0)
    assert all(abs(cleared) < 0.1 * naive**2 for cleared, naive in zip(variances, plain, strict=True))


def smooth(seed: int, sigma: float) -> Any:
    """Means (2, 48, 256) around 1 that differ by maps that are alike over `sigma` pixels, each channel's its own."""
    maps = np.random.default_rng(seed).normal(size=(48, 16 * 4, 16 * 4))
    along = np.fft.fftfreq(16 * 4)
    low = np.exp(-2 * (np.pi * sigma) ** 2 * (along[:, None] ** 2 + along**2))
    fields = np.fft.ifft2(np.fft.fft2(maps) * low).real[:, :16, :16]
    return np.repeat(1 + (0.5 * fields / fields.std())[None].reshape(1, 48, 256), 2, axis=0)


def test_a_rest_that_is_alike_at_neighbouring_positions_is_no_variation_along_channels() -> None:
    halves = [smooth(seed, 1.5) for seed in range(30)]
    variances = np.array([np.square(v) * np.sign(v) for v, _ in (variation(half, (16, 16)) for half in halves)])
    naive = np.array([half[0].mean(1).var(ddof=1) for half in halves])
    assert naive.mean() > 0.02  # a coefficient of 0.15 by the means alone
    assert abs(variances.mean()) < 0.12 * naive.mean()
    added = 0.3 * np.random.default_rng(0).normal(size=(48, 1))
    assert variation(halves[0] + added, (16, 16))[0] == pytest.approx(added.std(ddof=1), rel=0.2)


def test_an_estimate_below_zero_keeps_its_sign_and_is_told_as_none() -> None:
    halves = np.ones((2, 2, 6))
    halves[:, 0] += np.linspace(-0.5, 0.5, 6)
    assert variation(halves, (6,))[0] < 0


@pytest.mark.parametrize("shape", [(16, 16), (256,), (1, 256), (2, 128)])
def test_channels_are_found_on_maps_and_on_tokens(shape: tuple[int, ...]) -> None:
    assert variation(planted(3, 0.3, 0.1, 0.2, 0.01), shape)[0] == pytest.approx(0.3, rel=0.2)


def test_one_position_has_no_variation_along_space() -> None:
    halves = np.array([[[1.0], [3.0]]] * 2)
    channels, positions = variation(halves, (1, 1))
    assert channels == pytest.approx(2**0.5 / 2)
    assert np.isnan(positions)


# --- the picture --------------------------------------------------------------------------------------------------


def figure(path: Path, models: int, channels: int, shape: tuple[int, ...], count: int = 9) -> FigureData:
    """Data as `write_activations` leaves it, of random numbers."""
    rng = np.random.default_rng(0)
    kinds = (
        "size",
        *(f"{kind} {axis}" for kind in ("change", "base", "relative") for axis in ("channels", "positions")),
    )
    told: dict[str, Any] = {
        "models": [f"expert {i}" for i in range(models - 1)] + ["merged"],
        "places": [f"b.{k}" for k in range(count)],
    }
    told["protocol"] = {"num_images": 3, "draws": 1, "split": "train", "seed": 0}
    told["medians"] = [dict.fromkeys(kinds, 0.25)] * models
    arrays = {"sizes": rng.random((models, count)), "variations": rng.random((models, count, 3, 2))}
    for k in range(count):
        for name in ("", "base_"):
            arrays[f"{name}channels_{k}"] = 1 + rng.random((models, channels))
            arrays[f"{name}positions_{k}"] = 1 + rng.random((models, *shape))
    write_figure(path, "activations", told, **arrays)
    return read_figure(path)


@pytest.mark.parametrize(
    ("models", "channels", "shape", "count"),
    [(2, 3, (1, 1), 1), (9, 640, (32, 32), 9), (5, 16, (64,), 28), (3, 8, (7,), 2)],
)
def test_few_and_many_models_places_and_entries_are_drawn_small(
    tmp_path: Path, models: int, channels: int, shape: tuple[int, ...], count: int
) -> None:
    (picture,) = pictures([figure(tmp_path / "a.npz", models, channels, shape, count)])
    assert len(svg_of(picture.draw, picture.width, picture.height)) < 260_000
    assert picture.height < 12
    assert "25 %" in picture.caption and len(picture.caption.split()) <= 110


@pytest.mark.parametrize(
    ("channels", "positions", "said"),
    [
        (0.4, 0.1, "differs far more along channels than along space: by 40 % from channel to channel, 10 %"),
        (0.4, -0.1, "differs along channels, and is not found to differ along space: by 40 %"),
        (-0.1, 0.4, "is not found to differ along channels, but differs along space: by an amount not distinguishable"),
        (-0.1, 0.0, "is not found to differ along channels, nor along space"),
        (0.1, 0.4, "differs far less along channels than along space"),
        (0.2, 0.2, "differs along channels and along space"),
    ],
)
def test_no_ratio_is_told_of_what_was_not_found(tmp_path: Path, channels: float, positions: float, said: str) -> None:
    data = figure(tmp_path / "a.npz", 3, 8, (4, 4))
    medians = [{**one, "relative channels": channels, "relative positions": positions} for one in data.meta["medians"]]
    (picture,) = pictures([replace(data, meta={**data.meta, "medians": medians})])
    assert f"Relative to |F|, the change {said}" in picture.caption and " 0 %" not in picture.caption


def test_data_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    data = figure(tmp_path / "a.npz", 3, 8, (4, 4))
    for name, other in (("positions_2", np.ones((2, 4, 4))), ("variations", np.ones((3, 9, 2))), ("sizes", None)):
        arrays = {key: value for key, value in data.arrays.items() if key != name} | (
            {} if other is None else {name: other}
        )
        with pytest.raises(UserError, match=rf"a\.npz: .*{name}"):
            pictures([replace(data, arrays=arrays)])


def test_the_picture_needs_no_torch(tmp_path: Path) -> None:
    figure(tmp_path / "a.npz", 3, 8, (4, 4))
    sizes = sizes_without_torch(tmp_path / "a.npz")
    assert list(sizes) == ["activations"] and min(sizes.values()) > 10_000
