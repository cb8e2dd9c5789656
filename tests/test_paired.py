"""Changes from the base's loss with their errors, by image; a cell that is picked; the copies of weights on the way."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deme_diffusion.analysis import directions
from deme_diffusion.analysis.directions import leading_directions, left_over
from deme_diffusion.analysis.grid import Grid, least
from deme_diffusion.analysis.models import protocol
from deme_diffusion.analysis.paired import Changes, Paired
from deme_diffusion.analysis.plane import Plane, _marks
from deme_diffusion.config import AnalyzeSettings, LossSettings
from deme_diffusion.errors import UserError
from deme_diffusion.pipeline.space import HELD
from deme_diffusion.report.drawing.contours import compared, is_gain, plus_minus, within_noise
from quadratic import Known, at, module_at, noise_around, patterns

BASE, OTHER = at(seed=0), at(seed=0) + at(seed=1, scale=0.1)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3])
def test_a_change_and_its_error_are_those_of_the_images(draws: int) -> None:
    """Against the quadratic, an image's points together, ranges by their timesteps."""
    noise = noise_around(module_at(BASE))
    noise = replace(noise, settings=LossSettings(num_images=6, draws=draws))
    found = Paired.of(noise, module_at(BASE))
    changes = found.changes(np.array(found.row(module_at(OTHER))))
    known, by_image = Known(noise), []
    for point in (BASE, OTHER):
        losses = [((point @ patterns() - one) ** 2).mean(1).reshape(draws, 6).mean(0) for one in known.targets]
        by_image.append(np.average(losses, axis=0, weights=known.sizes))
    e = (by_image[1] - by_image[0]) / by_image[0].mean()
    assert changes.change[0] == pytest.approx(known.overall(OTHER) / known.overall(BASE) - 1, rel=1e-5)
    assert changes.change[0] == pytest.approx(e.mean(), rel=1e-5)
    assert changes.error[0] == pytest.approx(e.std(ddof=1) / 6**0.5, rel=1e-5)
    assert changes.half(0, 0) == pytest.approx(e[::2].mean(), rel=1e-5)
    np.testing.assert_allclose(changes.losses[1:], noise.losses(module_at(OTHER)), rtol=0)


def test_the_base_itself_changes_by_nothing_to_the_bit() -> None:
    found = Paired.of(noise_around(module_at(BASE)), module_at(BASE))
    changes = found.changes(np.array(found.row(module_at(BASE))))
    assert not changes.change.any() and not changes.error.any()


def noisy_cells(gain: float, seed: int, images: int = 64, cells: int = 9) -> tuple[Changes, Grid]:
    """Models of a square grid whose e is noise by image alone, but for one."""
    e = np.random.default_rng(seed).normal(size=(images, cells, cells))
    e[:, cells // 2, cells // 2] = 0.0  # the base
    e[:, 0, 0] += gain
    sums = np.array([[(e[half::2] ** power).sum(0)[None] for power in (1, 2)] for half in (0, 1)])
    axis = np.linspace(-1, 1, cells)
    return Changes(1 + e.mean(0)[None], sums, np.array([images / 2, images / 2])), Grid(axis, axis)


def test_a_picked_cell_is_tested_on_images_that_it_was_not_picked_on() -> None:
    """The least of many noisy cells seems to be a gain; tested, its mean is 0 and two errors hold 95 % of it."""
    found = [least(*args) for args in ((c, 0, g) for c, g in (noisy_cells(0.0, seed) for seed in range(60)))]
    tested = [one["tested"] for one in found if one]
    assert np.mean([one["change"] for one in found if one]) < -0.25
    assert abs(np.mean([one["change"] for one in tested])) < 0.06
    assert np.mean([within_noise(one) for one in tested]) > 0.85
    real = least(*(lambda pair: (pair[0], 0, pair[1]))(noisy_cells(-1.0, 0)))
    assert real and (real["a"], real["b"]) == (-1, -1) and is_gain(real["tested"])
    assert real["tested"]["change"] == pytest.approx(real["change"])  # both halves pick it


def test_changes_are_written_to_their_errors_digits() -> None:
    assert plus_minus({"change": -0.000674, "error": 0.00052}) == "\u22120.067 \u00b1 0.052%"
    assert plus_minus({"change": 1.234, "error": 0.21}) == "+123 \u00b1 21%"
    assert plus_minus({"change": 0.0, "error": 0.0}) == "0"
    assert plus_minus({"change": None, "error": None}) == "not finite"
    assert compared({"change": 0.1, "error": 0.06}).endswith(" (within noise)")
    assert not compared({"change": 0.1, "error": 0.04}).endswith(")")


def test_one_image_says_nothing_of_others() -> None:
    noise = noise_around(module_at(BASE))
    with pytest.raises(UserError, match="the split train has one image; two or more are compared"):
        protocol(replace(noise, split=replace(noise.split, indices=noise.split.indices[:1])), AnalyzeSettings())


# --- memory -------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A model of sixteen tensors of weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        for k in range(16):
            self.register_parameter(f"p{k}", nn.Parameter(torch.randn(20_000, generator=made)))


class Counted(TorchDispatchMode):
    """The bytes of the tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.see(one)
        return made

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if (at := storage.data_ptr()) not in self.alive:
            self.alive[at] = storage.nbytes()
            self.most = max(self.most, sum(self.alive.values()))
            weakref.finalize(storage, self.alive.pop, at, None)


@contextmanager
def models_held() -> Iterator[Callable[[], float]]:
    """How many models' weights were alive at most, the base among them."""
    gc.collect()
    with Counted() as counted:
        yield lambda: counted.most / (16 * 20_000 * 4)


class Lossless:
    """Takes no losses."""

    def row(self, module: nn.Module) -> list[float]:
        return [0.0] * 5

    def changes(self, rows: Any) -> Changes:
        return Changes(rows[:1], rows[1:].reshape(2, 2, 1), np.array([1.0, 1.0]))


def test_figures_of_losses_hold_as_many_models_as_the_estimate_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "AT_ONCE", 2_000)
    experts, names = [lambda seed=seed: Wide(seed) for seed in range(1, 6)], list("abcde")  # type: ignore[misc]
    with models_held() as held:
        base = Wide(0)
        plane = Plane.of(base, experts, (0, 4), names)
        marks = list(_marks(plane, base, experts, None, names, Lossless()))  # type: ignore[arg-type]
    assert len(marks) == 5 and HELD - 1 < held() < HELD + 0.1
    with models_held() as held:
        base = Wide(0)
        leading_directions(base, experts, names)
    assert HELD - 1 < held() < HELD + 0.1


def test_what_is_off_a_plane_is_found_without_cancellation() -> None:
    """In a plane of float32 vectors: their rounding, not its square root."""
    made = torch.Generator().manual_seed(0)
    u, v, off = ({"w": torch.randn(10_000, generator=made)} for _ in range(3))
    inside = {"w": (0.3 * u["w"].double() - 2 * v["w"].double())}
    assert left_over(inside, (0.3, -2.0), (u, v)) < 1e-10 * 100
    beside = {"w": inside["w"] + 1e-6 * off["w"], "other": torch.tensor([3e-5])}
    expected = float((1e-12 * off["w"].double().square().sum() + 9e-10) ** 0.5)
    assert left_over(beside, (0.3, -2.0), (u, v)) == pytest.approx(expected, rel=1e-3)
