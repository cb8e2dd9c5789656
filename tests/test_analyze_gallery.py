"""Figures drawn into a folder: what changed only, nothing stale, nothing lost; and drawn from files alone."""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deme_diffusion.config import FIGURES
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.figure_file import FigureData, read_figure, write_figure
from deme_diffusion.report.drawing import gallery, trajectory
from deme_diffusion.report.drawing.gallery import draw_figures, draw_files
from deme_diffusion.report.drawing.picture import Picture
from deme_diffusion.report.figures import svg_and_png_of, svg_of

Draw = Callable[[Any], None]


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Drawings that take no time: a picture for each name in the data; the names in the order they were drawn."""
    names: list[str] = []

    def pictures(data: Sequence[FigureData]) -> list[Picture]:
        names.extend(name for one in data for name in one.meta["pictures"])
        return [Picture(n, n, f"{len(data)} files", n, lambda figure: None) for n in data[0].meta["pictures"]]

    monkeypatch.setattr(gallery, "DRAWINGS", dict.fromkeys(gallery.DRAWINGS, pictures))
    monkeypatch.setattr(gallery, "svg_and_png_of", lambda *_: (b"<svg/>", b"png"))
    return names


def data_of(folder: Path, kind: str, *pictures: str, stem: str = "", **meta: Any) -> Path:
    """A figure's data outside the run's folder, as in the store."""
    file = folder / "store" / f"{stem or kind}.npz"
    write_figure(file, kind, {"pictures": list(pictures), **meta}, x=np.arange(3))
    return file


def drawn_in(run: Path, data: Mapping[str, Path]) -> list[str]:
    return [one["name"] for one in draw_figures(run, {kind: {kind: file} for kind, file in data.items()})]  # type: ignore[misc]


def names_in(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "figures").iterdir())


def kinds_in(run: Path) -> list[str]:
    return [entry["kind"] for entry in json.loads((run / "figures/figures.json").read_text())]


def test_only_what_changed_is_drawn_again(tmp_path: Path, drawn: list[str]) -> None:
    run, data = (
        tmp_path / "run",
        {"plane": data_of(tmp_path, "plane", "a"), "vectors": data_of(tmp_path, "vectors", "b")},
    )
    assert drawn_in(run, data) == ["a", "b"]
    assert drawn_in(run, data) == ["a", "b"]
    assert drawn == ["a", "b"]
    data_of(tmp_path, "vectors", "b", "c")
    (run / "figures/a.png").unlink()
    assert drawn_in(run, data) == ["a", "b", "c"]
    assert drawn == ["a", "b", "a", "b", "c"]


def test_pictures_that_a_figure_has_no_more_go_and_others_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    drawn_in(run, {"plane": data_of(tmp_path, "plane", "a", "old"), "vectors": data_of(tmp_path, "vectors", "b")})
    (run / "figures/own.svg").write_text("of somebody else")
    drawn_in(run, {"plane": data_of(tmp_path, "plane", "a")})
    kept = ["a.png", "a.svg", "b.png", "b.svg", "figures.json", "own.svg", "plane.npz", "vectors.npz"]
    assert names_in(run) == kept
    assert kinds_in(run) == ["plane", "vectors"]


def test_data_that_a_figure_has_no_more_go(tmp_path: Path) -> None:
    run = tmp_path / "run"
    two = {f"similarity{end}": data_of(tmp_path, "similarity", "s", stem=f"similarity{end}") for end in ("", "-1")}
    found = draw_figures(run, {"similarity": two})
    assert (found[0]["caption"], found[0]["data"]) == (
        "2 files",
        ["figures/similarity.npz", "figures/similarity-1.npz"],
    )
    draw_figures(run, {"similarity": {"similarity": two["similarity"]}})
    assert names_in(run) == ["figures.json", "s.png", "s.svg", "similarity.npz"]
    assert (tmp_path / "store/similarity-1.npz").is_file()


def test_a_figure_that_cannot_be_drawn_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(data: Sequence[FigureData]) -> list[Picture]:
        raise ZeroDivisionError("a grid of\nno points")

    run = tmp_path / "run"
    data = {kind: data_of(tmp_path, kind, kind) for kind in ("plane", "vectors", "landscape")}
    drawn_in(run, data)
    data_of(tmp_path, "plane", "other")
    monkeypatch.setitem(gallery.DRAWINGS, "plane", broken)
    data["landscape"].write_text("no data")
    with caplog.at_level(logging.WARNING):
        assert drawn_in(run, data) == ["vectors"]
    assert caplog.messages == [
        "plane is not drawn: ZeroDivisionError: a grid of no points",
        f"landscape is not drawn: {data['landscape']}: no figure's data; a .npz that deme analyze wrote is expected",
    ]
    assert kinds_in(run) == ["vectors"]


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise MachineError(f"cannot write {path}: no space left")

    monkeypatch.setattr(gallery, "write_bytes", full)
    with pytest.raises(MachineError, match="no space left"):
        drawn_in(tmp_path / "run", {"plane": data_of(tmp_path, "plane", "a")})


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '[{"kind": "plane"}]', '[{"kind": "plane", "stamp": 1, "pictures": 2}]']
)
def test_an_index_that_cannot_be_read_is_written_anew(tmp_path: Path, text: str) -> None:
    run = tmp_path / "run"
    (run / "figures").mkdir(parents=True)
    (run / "figures/figures.json").write_text(text)
    assert drawn_in(run, {"plane": data_of(tmp_path, "plane", "a")}) == ["a"]
    assert kinds_in(run) == ["plane"]


def test_what_an_index_of_a_stranger_names_elsewhere_is_not_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = data_of(tmp_path, "plane", "a")
    drawn_in(run, {"plane": file})
    precious = tmp_path / "run/precious.svg"
    precious.write_text("kept")
    index = json.loads((run / "figures/figures.json").read_text())
    index[0]["pictures"][0]["svg"] = "figures/../precious.svg"
    (run / "figures/figures.json").write_text(json.dumps(index))
    data_of(tmp_path, "plane", "b")
    drawn_in(run, {"plane": file})
    assert precious.is_file()


@pytest.mark.parametrize(
    "change",
    [
        {"svg": "../../../etc/passwd"},
        {"svg": "/etc/passwd"},
        {"svg": "figures/../figures/a.svg"},
        {"png": "figures/b.png"},
        {"name": "../a", "svg": "figures/../a.svg", "png": "figures/../a.png"},
        {"data": ["../secret.npz"]},
        {"data": [1]},
        {"width": None},
        {"width": "7"},
        {"height": float("inf")},
        {"height": True},
        {"alt": 1},
        {"kind": "vectors"},
    ],
)
def test_an_entry_that_was_never_written_by_us_is_drawn_again(
    tmp_path: Path, drawn: list[str], change: dict[str, Any]
) -> None:
    run, data = tmp_path / "run", {kind: data_of(tmp_path, kind, kind[0]) for kind in ("plane", "vectors")}
    data["plane"] = data_of(tmp_path, "plane", "a")
    drawn_in(run, data)
    index = json.loads((run / "figures/figures.json").read_text())
    whole = json.loads(json.dumps(index))
    index[0]["pictures"][0] |= change
    (run / "figures/figures.json").write_text(json.dumps(index))
    assert [one["svg"] for one in draw_figures(run, {"plane": {"plane": data["plane"]}})] == ["figures/a.svg"]
    assert drawn == ["a", "v", "a"]
    assert json.loads((run / "figures/figures.json").read_text()) == whole


def test_a_link_in_place_of_a_picture_is_drawn_over(tmp_path: Path, drawn: list[str]) -> None:
    run, data = tmp_path / "run", {"plane": data_of(tmp_path, "plane", "a")}
    drawn_in(run, data)
    secret = tmp_path / "secret"
    secret.write_text("own")
    (run / "figures/a.svg").unlink()
    (run / "figures/a.svg").symlink_to(secret)
    drawn_in(run, data)
    assert drawn == ["a", "a"]
    assert not (run / "figures/a.svg").is_symlink()
    assert secret.read_text() == "own"


def test_a_figure_is_drawn_again_where_its_own_drawing_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    before = {kind: gallery._drawn_by(kind) for kind in gallery.DRAWINGS}
    own = str(gallery.vectors.__file__)
    digest = gallery._digest
    monkeypatch.setattr(gallery, "_digest", lambda file: "other" if file == own else digest(file))
    assert [kind for kind in before if gallery._drawn_by(kind) != before[kind]] == ["vectors"]


def test_what_draws_a_figure_is_known() -> None:
    """Each module of drawings imports, of ours that draw, only those that its stamp covers."""
    folder, package = Path(gallery.__file__).parent, "deme_diffusion.report"
    beside = {kind: {module.__name__ for module in modules} for kind, modules in gallery.BESIDE.items()}
    shared = {module.__name__ for module in gallery.SHARED}
    for kind in FIGURES:
        tree = ast.parse((folder / f"{kind}.py").read_text())
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        drawing = {name for name in names if name.startswith(package)}
        assert drawing <= shared | beside.get(kind, set()), kind


def test_files_are_drawn_wherever_they_lie(tmp_path: Path) -> None:
    files = [data_of(tmp_path, "plane", "plane", stem=name) for name in ("mine", "yours")]
    ranges = {"b": [[0, 500]], "a": [[500, 1000]], "whole": [[0, 1000]]}
    subsets = {name: {"stem": name, "subset": ranges[name]} for name in sorted(ranges)}
    files += [data_of(tmp_path, "similarity", "similarity", **facts) for facts in subsets.values()]
    found = draw_files(files, tmp_path / "out")
    assert [(one["svg"], one["caption"]) for one in found] == [
        ("mine-plane.svg", "1 files"),
        ("yours-plane.svg", "1 files"),
        ("similarity.svg", "3 files"),
    ]
    assert [Path(file).stem for file in found[2]["data"]] == ["whole", "b", "a"]
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_files_of_one_name_are_told_apart_and_one_file_is_drawn_once(tmp_path: Path) -> None:
    for run in ("one", "two"):
        (tmp_path / run / "figures").mkdir(parents=True)
    made = [data_of(tmp_path / run, "plane", "plane") for run in ("one", "two")]
    files = [
        file.rename(tmp_path / run / "figures" / file.name) for file, run in zip(made, ("one", "two"), strict=True)
    ]
    assert [one["svg"] for one in draw_files([*files, files[0]], tmp_path / "out")] == [
        "one-plane-plane.svg",
        "two-plane-plane.svg",
    ]
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert [one["svg"] for one in draw_files([files[0], files[0]], tmp_path / "alone")] == ["plane.svg"]


def test_files_that_are_no_figures_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = data_of(tmp_path, "plain", "a")
    with pytest.raises(UserError, match=r"plain.npz: figure 'plain' is none of ours; did you mean 'plane'\?"):
        draw_files([unknown], tmp_path / "out")
    np.savez(tmp_path / "own.npz", x=np.arange(3))
    with pytest.raises(UserError, match=r"own.npz: no figure's data"):
        draw_files([tmp_path / "own.npz"], tmp_path / "out")
    monkeypatch.setattr(gallery, "DRAWINGS", {"trajectory": trajectory.pictures})
    empty = data_of(tmp_path, "trajectory", "a")
    with pytest.raises(UserError, match=r"trajectory.npz: no models, "):
        draw_files([empty], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- samples and trajectory, drawn ----------------------------------------------------------------


def trajectory_data(tmp_path: Path, size: tuple[int, int], channels: int, *, experts: Sequence[int]) -> FigureData:
    """Noise of some shape, for two models."""
    generator, steps = np.random.default_rng(0), len(experts)
    shapes = {"grid": 20, "x_t": steps, "x_0": steps}
    arrays = {
        f"{name}_{model}": generator.integers(0, 256, (count, *size, channels), np.uint8)
        for name, count in shapes.items()
        for model in ("base", "ensemble")
    }
    meta = {"models": ["base", "ensemble"], "names": [f"expert {i} $x$ <b>" for i in range(max(experts) + 1)]}
    meta |= {"sampler": "DDIM-4", "size": list(size), "num_steps": 50, "changed": {"base": 0.0, "ensemble": 1.25}}
    timesteps = np.linspace(999, 0, steps)
    write_figure(
        tmp_path / "t.npz",
        "trajectory",
        meta,
        timesteps=timesteps,
        steps=np.arange(steps),
        experts=np.array(experts),
        **arrays,
    )
    return read_figure(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("size", "channels", "experts"),
    [((8, 8), 1, [0]), ((32, 32), 3, [9, 3, 0]), ((128, 85), 3, [1] * 6 + [0] * 6), ((100, 128), 1, list(range(12)))],
)
def test_images_of_every_size_fit_into_a_small_picture(
    tmp_path: Path, size: tuple[int, int], channels: int, experts: list[int]
) -> None:
    samples, way = trajectory.pictures([trajectory_data(tmp_path, size, channels, experts=experts)])
    for picture in (samples, way):
        svg, png = svg_and_png_of(picture.draw, picture.width, picture.height)
        assert svg == svg_of(picture.draw, picture.width, picture.height)
        assert len(svg) < 700_000
        assert b"image-rendering:pixelated" in svg
        assert png.startswith(b"\x89PNG")
    assert ("the first 16 are shown" in samples.caption) == (max(size) > 32)
    assert (f"Images of {size[1]} x {size[0]} pixels are shown reduced" in way.caption) == (max(size) > 48)
    assert "ensemble by 1.25" in samples.caption


def test_small_images_are_shown_to_the_pixel(tmp_path: Path) -> None:
    data = trajectory_data(tmp_path, (8, 8), 1, experts=[0, 1])
    images = data.arrays["grid_base"]
    canvas, places = trajectory.tiled(trajectory.shown(images), 5, gap=1)
    assert canvas.shape == (4 * 9 - 1, 5 * 9 - 1, 4)
    left, top = places[7]
    assert (left, top) == (2 * 9, 9)
    assert np.array_equal(canvas[top : top + 8, left : left + 8, :3], np.repeat(images[7], 3, axis=2))
    assert (canvas[..., 3] == 255).sum() == 20 * 64
