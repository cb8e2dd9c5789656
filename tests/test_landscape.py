"""The landscape around a model whose loss is a known quadratic; directions against numpy; resuming; drawing."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from conftest import make_pico_denoiser
from deme_diffusion.analysis.directions import Shell, inner, leading_directions, random_direction, task_vector
from deme_diffusion.analysis.grid import CELLS, Grid, held
from deme_diffusion.analysis.landscape import write_landscape
from deme_diffusion.analysis.paired import Paired
from deme_diffusion.config import AnalyzeSettings
from deme_diffusion.errors import UserError
from deme_diffusion.figure_file import FigureData, read_figure
from deme_diffusion.models.projection import attach, attached
from deme_diffusion.report.drawing.contours import levels, smooth
from deme_diffusion.report.drawing.landscape import pictures
from deme_diffusion.report.figures import svg_of
from drawn import sizes_without_torch
from quadratic import SIZE, Array, Known, Linear, at, loads, module_at, noise_around, patterns

BASE = at(seed=0)
VECTORS = [at(seed=k, scale=0.1 * k) for k in (1, 2, 3)]
NAMES = ["expert 0", "expert 1", "expert 2"]


def flat(vector: dict[str, torch.Tensor]) -> Array:
    """A direction as the nine numbers of `quadratic`."""
    parts = [vector[name].double().numpy().ravel() if name in vector else np.zeros(3) for name in ("weight", "bias")]
    return np.concatenate(parts)


def landscape(
    folder: Path, base: nn.Module | None = None, vectors: list[Array] | None = None, **options: Any
) -> FigureData:
    """The figure's data, of 5 x 5 cells by default."""
    base = base or module_at(BASE)
    experts = loads(BASE, *(VECTORS if vectors is None else vectors))
    settings = AnalyzeSettings.model_validate({"landscape_points": 5, **options})
    path, names = folder / "landscape.npz", [f"expert {k}" for k in range(len(experts))]
    write_landscape(path, noise_around(base), base, experts, settings, names=names, partial=folder / "work")
    return read_figure(path)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", ["random", "task_vectors"])
def test_every_cell_is_the_quadratic_at_its_place(tmp_path: Path, directions: str) -> None:
    figure = landscape(tmp_path, directions=directions)
    base = module_at(BASE)
    if directions == "random":
        first, second = (flat(random_direction(base, 0, k)) for k in range(2))
    else:
        first, second = map(flat, leading_directions(base, loads(BASE, *VECTORS), NAMES).directions)
    known = Known(noise_around(base))
    a, b = figure.arrays["a"], figure.arrays["b"]
    radius = 0.25 if directions == "random" else 1.5
    np.testing.assert_allclose(a, np.linspace(-radius, radius, 5))
    assert a[2] == b[2] == 0.0
    for i in range(5):
        for j in range(5):
            point = BASE + a[i] * first + b[j] * second
            np.testing.assert_allclose(figure.arrays["loss"][:, i, j], known.losses(point), rtol=1e-6)
            assert figure.arrays["overall"][i, j] == pytest.approx(known.overall(point), rel=1e-6)


def test_the_middle_is_the_base_to_the_bit(tmp_path: Path) -> None:
    figure, base = landscape(tmp_path), module_at(BASE)
    noise = noise_around(base)
    assert figure.arrays["loss"][:, 2, 2].tolist() == noise.losses(base)
    assert figure.meta["told"][0]["base"] == pytest.approx(noise.overall(noise.losses(base)), rel=1e-14)


def test_curvature_border_and_least_loss_are_those_of_the_quadratic(tmp_path: Path) -> None:
    figure, known = landscape(tmp_path), Known(noise_around(module_at(BASE)))
    told, loss = figure.meta["told"][0], figure.arrays["overall"]
    bends = [second_derivative(flat(random_direction(module_at(BASE), 0, k))) for k in range(2)]
    assert told["curvature"] == pytest.approx(np.mean(bends) / known.overall(BASE), rel=1e-4)
    edge = np.concatenate([loss[0], loss[-1], loss[1:-1, 0], loss[1:-1, -1]])
    assert told["rise"] == pytest.approx(edge.mean() / known.overall(BASE) - 1)
    i, j = np.unravel_index(loss.argmin(), loss.shape)
    least = told["least"]
    assert [least[name] for name in ("loss", "a", "b")] == [loss.min(), figure.arrays["a"][i], figure.arrays["b"][j]]
    assert least["change"] == pytest.approx(loss.min() / known.overall(BASE) - 1)
    assert [row["base"] for row in figure.meta["told"][1:]] == pytest.approx(known.losses(BASE), rel=1e-6)


def second_derivative(direction: Array) -> float:
    """Of the loss along a direction d: 2 |d B|^2 / 64."""
    return float(2 * ((direction @ patterns()) ** 2).sum() / 64)


# --- directions ---------------------------------------------------------------------------------------------------


def test_every_filter_of_a_random_direction_is_as_long_as_the_models() -> None:
    module = make_pico_denoiser().module
    direction = random_direction(module, 0, 0)
    for name, own in module.named_parameters():
        assert (name in direction) == (own.ndim > 1)  # biases and norms stay
        if own.ndim > 1:
            torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), own.detach().flatten(1).norm(dim=1))


def test_a_filter_of_zeros_stays() -> None:
    module = Linear({"weight": np.zeros((3, 2)), "bias": np.ones(3)})
    assert not random_direction(module, 0, 0)["weight"].any()


def test_random_directions_are_keyed_by_seed_number_and_name_alone() -> None:
    module = module_at(BASE)
    turned = Linear({"bias": BASE[6:], "weight": BASE[:6].reshape(3, 2)})
    assert next(iter(turned.state_dict())) == "bias"
    own = random_direction(module, 0, 0)["weight"]
    assert torch.equal(own, random_direction(turned, 0, 0)["weight"])
    assert not torch.equal(own, random_direction(module, 0, 1)["weight"])
    assert not torch.equal(own, random_direction(module, 1, 0)["weight"])


def test_leading_directions_are_those_of_a_singular_value_decomposition() -> None:
    found = leading_directions(module_at(BASE), loads(BASE, *VECTORS), NAMES)
    left, values, right = np.linalg.svd(np.stack(VECTORS), full_matrices=False)
    unit = np.sqrt((values**2).sum() / 3)
    assert found.unit == pytest.approx(unit)
    np.testing.assert_allclose(found.shares, (values**2 / (values**2).sum())[:2])
    for k, direction in enumerate(found.directions):
        sign = np.sign(left[np.abs(left[:, k]).argmax(), k])
        np.testing.assert_allclose(flat(direction), sign * right[k] * unit, atol=1e-12)
        np.testing.assert_allclose(found.coordinates[:, k], sign * left[:, k] * values[k] / unit, atol=1e-12)
    assert inner(*found.directions) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(found.norms, [np.linalg.norm(vector) for vector in VECTORS])


def test_two_task_vectors_of_one_direction_have_one_leading_direction() -> None:
    found = leading_directions(module_at(BASE), loads(BASE, VECTORS[0], -2 * VECTORS[0]), NAMES)
    assert len(found.directions) == 1 and found.shares == pytest.approx([1.0])
    np.testing.assert_allclose(found.coordinates[0] * -2, found.coordinates[1], atol=1e-12)


def test_the_shell_stands_where_an_expert_with_unfolded_projections_stands() -> None:
    base, expert = make_pico_denoiser(seed=1).module.eval(), make_pico_denoiser(seed=2).module.eval()
    attach(expert, {"down_blocks.0": 0.1 * torch.ones(4, 4)})
    shell = Shell(base, [task_vector(base, expert, "expert 0")])
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([3, 9])
    with torch.no_grad():
        torch.testing.assert_close(shell.at(1.0)(x, t).sample, expert(x, t).sample, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(shell.at(0.5)(x, t).sample, expert(x, t).sample, rtol=1e-4, atol=1e-5)
        assert torch.equal(shell.at(0.0)(x, t).sample, base(x, t).sample)  # to the bit
    assert not attached(base)  # which was left as it is


def test_the_base_is_not_touched(tmp_path: Path) -> None:
    base = module_at(BASE)
    landscape(tmp_path, base)
    assert np.array_equal(np.concatenate([p.detach().numpy().ravel() for p in base.parameters()]), BASE)


def test_an_expert_of_another_architecture_is_refused() -> None:
    wider = Linear({"weight": np.zeros((4, 2)), "bias": np.zeros(3)})
    with pytest.raises(UserError, match=r"expert 1: weight is \(4, 2\), in the base it is \(3, 2\)"):
        leading_directions(module_at(BASE), [*loads(BASE, VECTORS[0]), lambda: wider], NAMES)
    with pytest.raises(UserError, match=r"expert 0: bias is missing, in the base it is \(3,\)"):
        task_vector(module_at(BASE), Linear({"weight": np.zeros((3, 2))}), "expert 0")


def test_an_expert_that_is_not_finite_leads_nowhere() -> None:
    with pytest.raises(UserError, match="expert 1: some of its weights are no finite numbers"):
        leading_directions(module_at(BASE), loads(BASE, VECTORS[0], VECTORS[1] * np.inf), NAMES)


# --- cells --------------------------------------------------------------------------------------------------------


class Failing(Exception):
    """Stands for a kill."""


def counted(monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None) -> list[int]:
    """The cells that are computed; after some of them, an exception."""
    seen: list[int] = []
    real = Paired.row

    def row(self: Paired, module: nn.Module) -> list[float]:
        if fail_after is not None and len(seen) == fail_after:
            raise Failing
        seen.append(1)
        return real(self, module)

    monkeypatch.setattr(Paired, "row", row)
    return seen


def test_a_landscape_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    landscape(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Failing):
        counted(patch, fail_after=9)
        landscape(tmp_path / "killed")
    journal = tmp_path / "killed" / "work" / CELLS
    assert len(journal.read_text().splitlines()) == 1 + 9  # a header, and what was done
    journal.write_text(journal.read_text() + '{"cell": [0, ')  # torn by the kill
    with monkeypatch.context() as patch:
        seen = counted(patch)
        landscape(tmp_path / "killed")
        assert len(seen) == 25 - 9
    whole, resumed = (tmp_path / name / "landscape.npz" for name in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_cells_of_other_settings_are_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    landscape(tmp_path, landscape_radius=0.1)
    seen = counted(monkeypatch)
    figure = landscape(tmp_path)
    assert len(seen) == 25 and "of other settings" in caplog.text
    assert figure.arrays["a"][-1] == 0.25


def test_cells_around_another_base_are_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    landscape(tmp_path)
    seen = counted(monkeypatch)
    landscape(tmp_path, module_at(BASE * 1.001))
    assert len(seen) == 25 and "of other settings" in caplog.text


def test_of_equal_cells_the_one_nearest_to_the_base_is_the_least() -> None:
    grid = Grid(np.array([-0.2, 0.0, 0.2]), np.array([-0.2, 0.0, 0.2]))
    assert grid.lowest(np.ones((3, 3))) == (1, 1)
    assert grid.lowest(np.where(np.eye(3) > 0, np.nan, 1.0)) == (0, 1)
    assert grid.lowest(np.full((3, 3), np.nan)) is None


def test_cells_go_from_the_middle_outwards() -> None:
    cells = Grid(np.array([-1.0, 0.0, 1.0]), np.array([-2.0, 0.0, 2.0])).cells
    assert cells[:3] == [(1, 1), (0, 1), (2, 1)] and len(set(cells)) == 9


class Breaking(Linear):
    """Predicts no numbers where its first weight is above the base's."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        (image,) = super().forward(x_t, t)
        return (image * float("inf"),) if self.weight[0, 0] > BASE[0] else (image,)


def test_cells_that_are_not_finite_are_nan_told_and_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = Breaking({"weight": BASE[:6].reshape(3, 2), "bias": BASE[6:]})
    with caplog.at_level(logging.WARNING):
        figure = landscape(tmp_path, base)
    bad = np.isnan(figure.arrays["overall"])
    assert 5 <= bad.sum() <= 15 and not bad[2, 2]
    assert f"the loss of {bad.sum()} of 25 cells is no number" in caplog.text
    again = landscape(tmp_path, base)  # from the journal
    np.testing.assert_array_equal(np.isnan(again.arrays["overall"]), bad)
    told = figure.meta["told"][0]
    assert told["rise"] is None and told["least"]["loss"] == np.nanmin(figure.arrays["overall"])
    (picture,) = pictures([figure])
    assert "not finite" in picture.caption and b"<svg" in svg_of(picture.draw, picture.width, picture.height)


def test_held_noise_gives_the_same_losses_to_the_bit() -> None:
    module = module_at(BASE)
    noise = noise_around(module)
    made = held(noise)
    assert made is not noise and made.losses(module) == noise.losses(module)
    assert held(noise, limit=100) is noise  # too large to hold


# --- drawing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", ["random", "task_vectors"])
def test_the_picture_says_its_numbers(tmp_path: Path, directions: str) -> None:
    figure = landscape(tmp_path, directions=directions)
    (picture,) = pictures([figure])
    svg = svg_of(picture.draw, picture.width, picture.height)
    assert b"<image" in svg and len(svg) < 250_000 and picture.width <= 7
    assert "6 images of the train split in each range" in picture.caption and len(picture.caption.split()) <= 100
    assert f"over all timesteps {figure.meta['told'][0]['base']:.4g}" in picture.caption
    assert picture.caption.startswith("From the middle to the border the loss changes by +")
    assert "Training loss" in picture.caption
    held_out = {**figure.meta, "protocol": {**figure.meta["protocol"], "split": "search"}}
    (picture,) = pictures([replace(figure, meta=held_out)])
    assert "Denoising loss on held-out images" in picture.caption and "raining" not in picture.caption
    assert ("Li et al. 2018" in picture.caption) == (directions == "random")
    assert ("leading ones (PCA)" in picture.caption) == (directions == "task_vectors")
    assert "[0,5)" in picture.alt and "[5,20)" in picture.alt


def test_experts_outside_the_map_are_told_and_not_drawn(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for radius, outside in ((1.5, 0), (0.5, 2)):
        figure = landscape(tmp_path, directions="task_vectors", landscape_radius=radius)
        assert (np.abs(figure.arrays["coordinates"]).max(axis=1) > radius).sum() == outside
        (picture,) = pictures([figure])
        assert (f"{outside} outside the map" in picture.caption) == bool(outside)
        canvas = Figure(figsize=(7, 4))
        picture.draw(canvas)
        labels = [text.get_text() for text in canvas.legends[0].get_texts()]
        assert sum("expert" in label for label in labels) == 3 - outside


def test_one_task_vector_gives_a_curve_and_none_a_sentence(tmp_path: Path) -> None:
    one = landscape(tmp_path / "one", vectors=VECTORS[:1], directions="task_vectors")
    assert one.arrays["loss"].shape == (2, 5, 1) and one.arrays["b"].tolist() == [0.0]
    known = Known(noise_around(module_at(BASE)))
    expected = [known.overall(BASE + a * VECTORS[0]) for a in one.arrays["a"]]
    np.testing.assert_allclose(one.arrays["overall"][:, 0], expected, rtol=1e-6)
    none = landscape(tmp_path / "none", vectors=[np.zeros(SIZE)] * 2, directions="task_vectors")
    assert none.arrays["loss"].shape == (2, 1, 1)
    for figure in (one, none):
        (picture,) = pictures([figure])
        assert b"<svg" in svg_of(picture.draw, picture.width, picture.height)
    assert "All task vectors are 0" in picture.caption and picture.alt


def test_a_least_loss_within_noise_is_hollow_and_said_to_be(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = landscape(tmp_path)
    for change, error, word in ((-0.01, 0.02, ", within noise"), (-0.01, 0.001, ""), (0.01, 0.001, ", no gain")):
        least = {"loss": 1.0, "a": 0.125, "b": 0.25, "change": -0.02, "tested": {"change": change, "error": error}}
        rows = [{**row, "least": least} for row in figure.meta["told"]]
        (picture,) = pictures([replace(figure, meta={**figure.meta, "told": rows})])
        sentence = "of the 25 models drawn, \u22122%, is picked; tested on other images: "
        assert sentence in picture.caption and f"%{word}. Training" in picture.caption
        canvas = Figure(figsize=(7, 4))
        picture.draw(canvas)
        labels = [text.get_text() for text in canvas.legends[0].get_texts()]
        assert ("least loss of the grid, within noise" in labels) == (word != "")


def test_few_points_are_refused() -> None:
    for options in ({"landscape_points": 1}, {"landscape_points": 4}, {"num_images": 1}):
        with pytest.raises(ValidationError):
            AnalyzeSettings.model_validate(options)


@pytest.mark.parametrize("name", ["loss", "overall", "a"])
def test_data_without_an_array_or_with_another_shape_are_refused_by_name(tmp_path: Path, name: str) -> None:
    figure = landscape(tmp_path)
    arrays = {key: value for key, value in figure.arrays.items() if key != name}
    with pytest.raises(UserError, match=rf"landscape.npz: no {name} in it"):
        pictures([replace(figure, arrays=arrays)])
    arrays[name] = figure.arrays[name][..., :3]
    with pytest.raises(UserError, match=r"landscape.npz: \w+ is of shape \(.*\); \(.*\) belongs there"):
        pictures([replace(figure, arrays=arrays)])
    with pytest.raises(UserError, match=r"landscape.npz: no told in it"):
        pictures([replace(figure, meta={key: value for key, value in figure.meta.items() if key != "told"})])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 12])
def test_any_number_of_ranges_is_drawn(tmp_path: Path, count: int) -> None:
    figure = landscape(tmp_path)
    protocol = {**figure.meta["protocol"], "ranges": [f"[{k},{k + 1})" for k in range(count)]}
    meta = {**figure.meta, "protocol": protocol, "told": [figure.meta["told"][0]] * (count + 1)}
    arrays = {**figure.arrays, "loss": figure.arrays["loss"][:1].repeat(count, axis=0)}
    (picture,) = pictures([replace(figure, meta=meta, arrays=arrays)])
    drawn = svg_of(picture.draw, picture.width, picture.height).count(b"<image")
    assert drawn == {1: 1, 12: 9}.get(count, count + 1)


def test_levels_reach_from_the_flattest_map_to_the_highest_value() -> None:
    at = levels([np.array([0.0, 7.0]), np.array([0.0, 900.0])])
    assert at.tolist() == [0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert levels([np.array([-3.0, 4.0])]).tolist() == [-5, -2, -1, -0.5, -0.2, 0, 0.2, 0.5, 1, 2, 5]
    wide = levels([np.array([0.0, 1e-3]), np.array([-1e3, 1e6])])
    assert len(wide) <= 17 and wide[0] <= -1e3 and wide[-1] >= 1e6
    assert levels([np.zeros(3), np.full(2, np.nan)]).tolist() == [-1, 0, 1]
    assert (np.diff(at) > 0).all()


def test_a_smoothed_map_goes_through_its_cells() -> None:
    x, y = np.linspace(-1, 1, 5), np.linspace(0, 1, 4)
    height = 10 * x[:, None] ** 2 + 3 * y**2 - 1
    fine_x, fine_y, fine = smooth(x, y, height, 4)
    assert fine.shape == (17, 13)
    np.testing.assert_allclose(fine[::4, ::4], height, atol=1e-9)
    np.testing.assert_allclose(fine_x[::4], x)
    np.testing.assert_allclose(fine_y[::4], y)


def test_it_is_drawn_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    landscape(tmp_path)
    sizes = sizes_without_torch(tmp_path / "landscape.npz")
    assert list(sizes) == ["landscape"] and sizes["landscape"] > 10_000
