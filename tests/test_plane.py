"""The plane of two task vectors of a model whose loss is a known quadratic: values, optimum, marks; and lines."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from deme_diffusion.analysis.directions import inner
from deme_diffusion.analysis.grid import CELLS
from deme_diffusion.analysis.paired import Paired
from deme_diffusion.analysis.plane import Plane, write_plane
from deme_diffusion.config import AnalyzeSettings
from deme_diffusion.errors import UserError
from deme_diffusion.figure_file import FigureData, read_figure
from deme_diffusion.report.drawing.contours import plus_minus, rounded
from deme_diffusion.report.drawing.plane import pictures
from deme_diffusion.report.figures import svg_of
from drawn import sizes_without_torch
from quadratic import SIZE, Array, Known, Linear, at, loads, module_at, noise_around

BASE = at(seed=0)
TAU = [at(seed=k, scale=0.2 * k) for k in (1, 2, 3)]
MERGED = 0.3 * TAU[0] + 0.6 * TAU[2]


def plane(
    folder: Path, vectors: list[Array] | None = None, merged: Array | None = MERGED, *, pair: tuple[int, int] = (0, 2)
) -> FigureData:
    """The figure's data, of 8 x 8 cells in steps of 0.2."""
    base, path = module_at(BASE), folder / "plane.npz"
    experts = loads(BASE, *(TAU if vectors is None else vectors))
    load = None if merged is None else loads(BASE, merged)[0]
    names = [f"expert {k} [{k},{k + 1})" for k in range(len(experts))]
    settings, options = AnalyzeSettings(plane_points=8), {"pair": pair, "names": names, "partial": folder / "work"}
    write_plane(path, noise_around(base), base, experts, load, settings, **options)  # type: ignore[arg-type]
    return read_figure(path)


def axes_of(first: Array, second: Array) -> tuple[Array, Array]:
    """u and v."""
    return first, second - (second @ first) / (first @ first) * first


@cache
def known() -> Known:
    """The quadratic."""
    return Known(noise_around(module_at(BASE)))


# --- values -------------------------------------------------------------------------------------------------------


def test_every_cell_is_the_quadratic_at_its_place(tmp_path: Path) -> None:
    figure, (u, v) = plane(tmp_path), axes_of(TAU[0], TAU[2])
    x, y = figure.arrays["x"], figure.arrays["y"]
    assert x.tolist() == y.tolist() == [-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    for i in range(8):
        for j in range(8):
            point = BASE + x[i] * u + y[j] * v
            np.testing.assert_allclose(figure.arrays["loss"][:, i, j], known().losses(point), rtol=1e-6)
            assert figure.arrays["overall"][i, j] == pytest.approx(known().overall(point), rel=1e-6)


def test_zero_and_one_are_on_the_grid_that_is_drawn_by_default() -> None:
    figure = Plane({}, {}, (1.0, 1.0), 0.0)
    points = AnalyzeSettings().plane_points
    assert all({0.0, 1.0} <= set(one.tolist()) and len(one) == 15 for one in figure.axes(points))


def test_the_optimum_is_that_of_the_quadratic_on_the_grid(tmp_path: Path) -> None:
    figure, (u, v) = plane(tmp_path), axes_of(TAU[0], TAU[2])
    x, y = figure.arrays["x"], figure.arrays["y"]
    values = {(a, b): known().overall(BASE + a * u + b * v) for a in x for b in y}
    best = min(values, key=values.__getitem__)
    assert (figure.meta["optimum"]["x"], figure.meta["optimum"]["y"]) == best
    assert figure.meta["optimum"]["loss"] == pytest.approx(values[best], rel=1e-6)


def test_models_are_marked_where_they_stand_with_their_own_losses(tmp_path: Path) -> None:
    figure, (u, v) = plane(tmp_path), axes_of(TAU[0], TAU[2])
    c = (TAU[2] @ TAU[0]) / (TAU[0] @ TAU[0])
    marks = {(mark["role"], mark["index"]): mark for mark in figure.meta["marks"]}
    x, y = (TAU[1] @ u) / (u @ u), (TAU[1] @ v) / (v @ v)
    off = np.linalg.norm(TAU[1] - x * u - y * v) / np.linalg.norm(TAU[1])
    expected = {
        ("base", None): (0, 0, 0, BASE),
        ("expert", 0): (1, 0, 0, BASE + TAU[0]),
        ("expert", 1): (x, y, off, BASE + TAU[1]),
        ("expert", 2): (c, 1, 0, BASE + TAU[2]),
        ("merged", None): (0.3 + 0.6 * c, 0.6, 0, BASE + MERGED),
    }
    assert marks.keys() == expected.keys()
    assert off > 0.1
    for key, (a, b, distance, point) in expected.items():
        found = marks[key]
        np.testing.assert_allclose([found["x"], found["y"], found["distance"]], [a, b, distance], atol=1e-7)
        np.testing.assert_allclose(found["losses"], [known().overall(point), *known().losses(point)], rtol=1e-6)
    cosine = TAU[0] @ TAU[2] / np.linalg.norm(TAU[0]) / np.linalg.norm(TAU[2])
    assert figure.meta["cosine"] == pytest.approx(cosine)
    np.testing.assert_allclose(figure.meta["lengths"], [np.linalg.norm(u), np.linalg.norm(v)])


def test_the_axes_are_orthogonal() -> None:
    names = ["expert 0", "expert 1", "expert 2"]
    found = Plane.of(module_at(BASE), loads(BASE, *TAU), (1, 2), names)
    assert abs(inner(found.u, found.v)) < 1e-14 * found.lengths[0] * found.lengths[1]


def test_a_grid_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plane(tmp_path / "whole")
    real, calls = Paired.row, [0]

    def row(self: Paired, module: nn.Module) -> list[float]:
        calls[0] += 1
        if calls[0] == 5 + 20:  # base, three experts, merged model, then cells
            raise KeyboardInterrupt
        return real(self, module)

    monkeypatch.setattr(Paired, "row", row)
    with pytest.raises(KeyboardInterrupt):
        plane(tmp_path / "killed")
    assert len((tmp_path / "killed" / "work" / CELLS).read_text().splitlines()) == 1 + 19
    calls[0] = 100
    plane(tmp_path / "killed")
    assert calls[0] - 100 == 5 + 64 - 19
    whole, resumed = (tmp_path / name / "plane.npz" for name in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_models_that_are_not_finite_have_no_loss(tmp_path: Path) -> None:
    broken = TAU[1].copy()
    broken[0] = np.nan
    figure = plane(tmp_path, [TAU[0], TAU[2]], broken, pair=(0, 1))
    mark = figure.meta["marks"][-1]
    assert mark["losses"] == [None] * 3
    (picture,) = pictures([figure])
    assert "merged not finite" in picture.caption and svg_of(picture.draw, picture.width, picture.height)
    nowhere = plane(tmp_path / "nowhere", [broken, TAU[2]], None, pair=(0, 1))  # drawn along the other
    assert nowhere.arrays["overall"].shape == (1, 8) and nowhere.meta["marks"][1]["x"] is not None
    (picture,) = pictures([nowhere])
    assert "expert 0 not finite" in picture.caption and svg_of(picture.draw, picture.width, picture.height)


# --- what spans no plane ------------------------------------------------------------------------------------------


def test_one_expert_gives_a_line(tmp_path: Path) -> None:
    figure = plane(tmp_path, TAU[:1], 0.5 * TAU[0], pair=(0, 0))
    assert figure.arrays["overall"].shape == (8, 1) and figure.arrays["y"].tolist() == [0.0]
    expected = [known().overall(BASE + x * TAU[0]) for x in figure.arrays["x"]]
    np.testing.assert_allclose(figure.arrays["overall"][:, 0], expected, rtol=1e-6)
    places = [(mark["role"], mark["x"], mark["y"]) for mark in figure.meta["marks"]]
    assert places == [("base", 0, 0), ("expert", pytest.approx(1), 0), ("merged", pytest.approx(0.5), 0)]
    (picture,) = pictures([figure])
    assert "along the task vector of expert 0" in picture.title
    assert b"<svg" in svg_of(picture.draw, picture.width, picture.height)


@pytest.mark.parametrize(
    "vectors, shape",
    [
        ([TAU[0], -2 * TAU[0]], (8, 1)),
        ([TAU[0], np.zeros(SIZE)], (8, 1)),
        ([np.zeros(SIZE), TAU[0]], (1, 8)),
        ([np.zeros(SIZE)] * 2, (1, 1)),
    ],
)
def test_task_vectors_that_span_no_plane_are_told_and_drawn(
    tmp_path: Path, vectors: list[Array], shape: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    figure = plane(tmp_path, vectors, 0.5 * TAU[0], pair=(0, 1))
    assert figure.arrays["overall"].shape == shape and "span none" in caplog.text
    (picture,) = pictures([figure])
    assert "span no plane" in picture.caption and picture.alt
    assert b"<svg" in svg_of(picture.draw, picture.width, picture.height)


def test_an_expert_of_another_architecture_is_refused(tmp_path: Path) -> None:
    base, wider = module_at(BASE), Linear({"weight": np.zeros((4, 2)), "bias": np.zeros(3)})
    options: dict[str, Any] = {"pair": (0, 1), "names": ["expert 0", "expert 1"], "partial": tmp_path / "work"}
    with pytest.raises(UserError, match=r"merged: weight is \(4, 2\)"):
        write_plane(tmp_path / "plane.npz", noise_around(base), base, loads(BASE, *TAU[:2]), lambda: wider,
                    AnalyzeSettings(), **options)  # fmt: skip


# --- drawing ------------------------------------------------------------------------------------------------------


def test_the_picture_says_where_models_stand(tmp_path: Path) -> None:
    figure = plane(tmp_path)
    (picture,) = pictures([figure])
    svg = svg_of(picture.draw, picture.width, picture.height)
    assert b"<image" in svg and len(svg) < 250_000 and picture.width <= 7
    best, off = figure.meta["optimum"], figure.meta["marks"][2]["distance"]
    assert f"The least of the 64 models drawn, {rounded(best['change'])}, is picked" in picture.caption
    assert f"expert 1 {off:.0%}." in picture.caption  # and no other is off the plane
    merged = figure.meta["marks"][-1]
    assert "0 other" not in picture.caption and f"merged {plus_minus(merged)}" in picture.caption
    assert "1 other " in picture.caption and len(picture.caption.split()) <= 100
    assert "expert 0 and expert 2" in picture.title and "merged" in picture.alt


def test_models_outside_the_map_are_drawn_beside_it_and_those_far_away_only_told(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = plane(tmp_path)
    marks = [*figure.meta["marks"][:-1], {**figure.meta["marks"][-1], "x": 1.9, "y": -0.5}]
    for far in (False, True):
        marks[2] = {**marks[2], "x": 40.0 if far else 0.5}
        (picture,) = pictures([replace(figure, meta={**figure.meta, "marks": marks})])
        canvas = Figure(figsize=(7, 4))
        picture.draw(canvas)
        assert canvas.axes[0].get_xlim()[1] == pytest.approx(1.9 + 0.06 * 1.4)
        assert canvas.axes[0].get_ylim()[0] == pytest.approx(-0.5 - 0.06 * 1.4)
        labels = [text.get_text() for text in canvas.legends[0].get_texts()]
        assert any("expert 1" in label for label in labels) == (not far)
        assert "expert 1" in picture.caption


def test_of_many_experts_the_two_of_the_plane_are_named(tmp_path: Path) -> None:
    figure = plane(tmp_path)
    base, first, other, second, merged = figure.meta["marks"]
    others = [{**other, "index": k, "name": f"expert {k}"} for k in range(3, 40)]
    marks = [base, first, other, second, *others, merged]
    (picture,) = pictures([replace(figure, meta={**figure.meta, "marks": marks})])
    assert "38 others" in picture.caption and "expert 1 " not in picture.caption
    assert "expert 0 " in picture.caption and "merged" in picture.caption and len(picture.caption) < 1000
    assert svg_of(picture.draw, picture.width, picture.height).count(b"expert 30") == 0


def test_it_is_drawn_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    plane(tmp_path)
    sizes = sizes_without_torch(tmp_path / "plane.npz")
    assert list(sizes) == ["plane"] and sizes["plane"] > 10_000
