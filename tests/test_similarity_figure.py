"""The figure of gradient similarity: closed forms, parts of [0, T), memory, and its drawing without torch."""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deme_diffusion.analysis.similarity import bins_of, shares, summary, write_similarity
from deme_diffusion.analysis.sketch import COLUMNS, Sketches, compared, cosines, sketch_into, standard_error
from deme_diffusion.config import PretrainSettings, SimilaritySettings
from deme_diffusion.data.splits import Split, SplitName
from deme_diffusion.division import uniform
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.cost import _LiveBytes
from deme_diffusion.figure_file import FigureData, read_figure, write_figure
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.denoiser import Noised
from deme_diffusion.report.drawing.similarity import pictures, thinned
from deme_diffusion.report.figures import png_of, svg_of
from deme_diffusion.similarity_file import read_similarity

Splits = dict[SplitName, Split]
T = 12


class Circle(DDPM):
    """Answers with its 64 parameters, at 0; what it should answer goes round half a circle with t, whatever x is.

    So the gradient at t is that of a quadratic, along the target, and the cosine at s and t is cos(pi (s - t) / T).
    """

    def __init__(self) -> None:
        self.module = nn.ParameterDict({"answer": torch.zeros(1, 8, 8, dtype=torch.float64)})
        draw = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 2)))[0].T.reshape(2, 1, 8, 8)
        self.plane = torch.from_numpy(draw)

    @property
    def num_train_timesteps(self) -> int:
        return T

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (1, 8, 8)

    def noised(self, batch: dict[str, Any], t: torch.Tensor, noise: torch.Tensor) -> Noised:
        angle = np.pi * t[:, None, None, None].double() / T
        return Noised(noise, t, angle.cos() * self.plane[0] + angle.sin() * self.plane[1], {})

    def predict(self, module: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        return module["answer"].expand(len(t), -1, -1, -1)  # type: ignore[index, no-any-return]


def figure(path: Path, split: Split, subset: Any = None, **settings: Any) -> FigureData:
    values = SimilaritySettings(**{"bins": T, "num_images": 4, **settings})
    write_similarity(path, Circle(), split, values, subset=subset, batch_size=2)
    return read_figure(path)


def around(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.asarray(np.cos(np.pi * (one[:, None] - other[None, :]) / T))


# closed forms


def test_cosines_of_quadratics_are_known(digits: Splits, tmp_path: Path) -> None:
    found = figure(tmp_path / "s.npz", digits["train"])
    t = np.arange(T)
    np.testing.assert_allclose(found.arrays["cosine"], around(t, t), atol=1e-6)
    np.testing.assert_allclose(found.arrays["norms"], 2 / 64)
    np.testing.assert_allclose(found.arrays["cross"], around(t, t), atol=1e-6)  # no noise
    np.testing.assert_allclose(found.arrays["cross_error"], 0, atol=1e-12)
    assert found.meta["determined"] == found.meta["bins"] == T
    apart = np.abs(t[:, None] - t)[np.triu_indices(T, 1)]
    assert found.meta["expected"] == pytest.approx((apart > 6).mean(), abs=(apart == 6).mean())
    apart = np.abs(t[:, None] - t)[np.triu_indices(T, 1)]
    meta = found.meta
    assert meta["error"] == 0 and meta["conflicting_least"] == meta["conflicting_most"] == meta["conflicting"]
    assert meta["conflicting"] == pytest.approx((apart > 6).mean(), abs=(apart == 6).mean())  # those at 6: rounding
    assert meta["neighbours"] == pytest.approx(np.cos(np.pi / T))
    assert (meta["parameters"], meta["sketch"], meta["T"], meta["name"]) == (64, 64, T, "[0,12)")


def test_bins_and_parts_of_the_timesteps(digits: Splits, tmp_path: Path) -> None:
    part = figure(tmp_path / "a.npz", digits["train"], [[4, 8]])
    np.testing.assert_allclose(part.arrays["cosine"], around(np.arange(4, 8), np.arange(4, 8)), atol=1e-6)
    assert part.arrays["edges"].tolist() == [4, 5, 6, 7, 8] and part.meta["edges"] == "timestep"
    scattered, t = figure(tmp_path / "b.npz", digits["train"], [[0, 2], [9, 12]]), np.array([0, 1, 9, 10, 11])
    np.testing.assert_allclose(scattered.arrays["cosine"], around(t, t), atol=1e-6)
    assert scattered.arrays["edges"].tolist() == [*range(6)] and scattered.meta["edges"] == "position in the subset"
    assert scattered.meta["name"] == "[0,2)+[9,12)" and scattered.meta["subset"] == [[0, 2], [9, 12]]
    thirds = figure(tmp_path / "c.npz", digits["train"], bins=4, num_images=24)  # a bin's gradient: three angles' mean
    middle = np.arange(4) * 3 + 1
    np.testing.assert_allclose(thirds.arrays["cosine"], around(middle, middle), atol=1e-6)
    one = figure(tmp_path / "d.npz", digits["train"], [[3, 4]], num_images=1)
    assert one.arrays["cosine"].tolist() == [[1.0]]
    assert (one.meta["groups"], one.meta["determined"]) == (1, 0) and "expected" not in one.meta
    assert one.arrays["cross"].tolist() == [[0.0]] and np.isinf(one.arrays["cross_error"]).all()
    for subset in ([], [[8, 13]], [[-1, 3]]):
        with pytest.raises(UserError, match=r"timesteps of \[0, 12\) expected"):
            figure(tmp_path / "e.npz", digits["train"], subset)


@pytest.mark.parametrize(("count", "bins"), [(20, 20), (20, 7), (1000, 33), (5, 9), (2, 1)])
def test_bins_are_those_of_a_uniform_division(count: int, bins: int) -> None:
    division = uniform(min(bins, count), count)
    edges = bins_of(count, bins)
    assert [[lo, hi] for lo, hi in itertools.pairwise(edges)] == [division.subset(i)[0] for i in range(len(edges) - 1)]


def test_division_is_made_from_the_figure_of_all_timesteps_only(digits: Splits, tmp_path: Path) -> None:
    found = figure(tmp_path / "a.npz", digits["train"], bins=5)
    read = read_similarity(tmp_path / "a.npz", T)
    assert read.edges.tolist() == [0, 3, 5, 8, 10, 12] == found.arrays["edges"].tolist()
    np.testing.assert_allclose(read.cosine, found.arrays["cosine"])
    for name, subset in (("b", [[4, 8]]), ("c", [[0, 2], [9, 12]])):
        figure(tmp_path / f"{name}.npz", digits["train"], subset)
        with pytest.raises(UserError, match="ascend from 0 to 12"):
            read_similarity(tmp_path / f"{name}.npz", T)


# what is no noise


class Noisy(Circle):
    """Like `Circle` with two angles only, 0 before the middle of T and pi from there on, and noise of the images' own.

    The expected gradient has a norm of `signal` / 64 on each side of the middle; the noise has `ranks` directions.
    """

    def __init__(self, signal: float, ranks: int) -> None:
        super().__init__()
        self.signal, self.ranks = signal, ranks

    def noised(self, batch: dict[str, Any], t: torch.Tensor, noise: torch.Tensor) -> Noised:
        side = torch.where(t < T // 2, 1.0, -1.0)[:, None, None, None].double()
        draw = noise.double().flatten(1)
        draw[:, self.ranks :] = 0
        return Noised(noise, t, side * self.signal * self.plane[0] + draw.reshape(noise.shape), {})


def told(denoiser: DDPM, path: Path, split: Split, **settings: Any) -> dict[str, Any]:
    values = SimilaritySettings(**{"bins": 4, "num_images": 32, **settings})
    return write_similarity(path, denoiser, split, values, batch_size=4)


@pytest.mark.parametrize("sketch", [64, 32])
def test_planted_conflict_is_found_beyond_noise(sketch: int, digits: Splits, tmp_path: Path) -> None:
    found = told(Noisy(3.0, 64), tmp_path / "s.npz", digits["train"], num_images=64, sketch=sketch)
    assert found["determined"] == 4 and found["expected"] == pytest.approx(4 / 6)  # pairs on two sides of the middle
    cross = read_figure(tmp_path / "s.npz").arrays["cross"]
    if sketch == 64:  # |E g|^2 over |g|^2, where |g|^2 has 64 / 64 of noise on 9 of the planted
        np.testing.assert_allclose(np.diagonal(cross), 0.9, atol=0.1)


@pytest.mark.parametrize("ranks", [2, 64])
def test_planted_noise_is_not_determined(ranks: int, digits: Splits, tmp_path: Path) -> None:
    path, wrong = tmp_path / "s.npz", 0
    for seed in range(20):
        found = told(Noisy(0.0, ranks), path, digits["train"], seed=seed, bins=2, num_images=16)
        assert found["conflicting"] == 0 and found["mean"] > 0.99  # noise that the bins share looks like agreement
        wrong += found["determined"] > 0
        if seed == 0:
            assert not told(Noisy(0.0, ranks), path, digits["train"], num_images=1)["determined"]
    assert wrong <= 2  # at most 2.3% each


def test_standard_error_is_that_of_leaving_out_groups() -> None:
    draw = np.random.default_rng(0)
    sums, sizes = draw.normal(size=(6, 5)) + 0.5, [3, 3, 2, 2, 2, 2]

    def square(kept: list[int]) -> float:
        pairs = [(a, b) for a in kept for b in kept if a != b]
        return float(sum(sums[a] @ sums[b] for a, b in pairs) / sum(sizes[a] * sizes[b] for a, b in pairs))

    unit = np.square(sums.sum(axis=0)).sum() / sum(sizes) ** 2
    left = np.array([square([a for a in range(6) if a != out]) for out in range(6)])
    expected = square([*range(6)]) / unit, np.sqrt(5 / 6 * np.square(left - left.mean()).sum()) / unit
    np.testing.assert_allclose(standard_error(sums @ sums.T, sizes), expected)
    cross = compared(lambda rows, columns: sums[None][rows, :, columns], (1, 6, 5), sizes)[1]
    assert cross[0, 0] == pytest.approx(expected[0])
    assert standard_error(sums[:3] @ sums[:3].T, sizes[:3]) == (0.0, np.inf)  # too few
    assert standard_error(np.zeros((6, 6)), sizes) == (0.0, np.inf)
    far = [standard_error(x @ x.T, [1] * 8) for x in draw.normal(size=(4000, 8, 3))]
    assert np.mean([square > 2 * error for square, error in far]) < 0.0228


# the sketch's error


def test_sketch_errs_as_stated() -> None:
    draw = torch.Generator().manual_seed(0)
    size, off = 128, []
    vectors = (
        torch.randn(12, 3000, generator=draw) + torch.randn(1, 3000, generator=draw) * torch.linspace(0, 2, 12)[:, None]
    )
    true = cosines(vectors.double().numpy())
    pairs = np.triu_indices(12, 1)
    kept = 0
    for seed in range(60):
        sketches = np.empty((12, size))
        for sketch, vector in zip(sketches, vectors, strict=True):
            sketch_into(sketch, [vector], seed)
        found = cosines(sketches)
        off.append((found - true)[pairs] / (1 - true[pairs] ** 2) * size**0.5)
        told = shares(found, size**-0.5)
        kept += told["conflicting_least"] <= shares(true, 0.0)["conflicting"] <= told["conflicting_most"]
    outside = float((np.abs(np.stack(off)) > 2).mean())
    assert 0.02 < outside < 0.08  # 4.6% of a normal distribution
    assert kept >= 57


def test_tiles_and_columns_change_nothing() -> None:
    vectors = np.random.default_rng(0).normal(size=(70, COLUMNS + 5))
    vectors[3] = 0
    found = cosines(vectors)
    unit = np.delete(vectors, 3, 0) / np.linalg.norm(np.delete(vectors, 3, 0), axis=1, keepdims=True)
    np.testing.assert_allclose(np.delete(np.delete(found, 3, 0), 3, 1), unit @ unit.T, atol=1e-6)
    assert (found == found.T).all() and (np.diagonal(found) == 1).all() and not found[3, [0, 1, 2, 4, 69]].any()


# memory


def peak(denoiser: DDPM, work: Callable[[], object]) -> int:
    """Most bytes of tensors, the base's own included, and most of Python's and numpy's objects that some work takes."""
    gc.collect()
    live = _LiveBytes()
    for parameter in denoiser.module.parameters():
        live.add(parameter)
    with live:
        work()
    tracemalloc.start()  # by itself: both at once take ten times as long
    try:
        work()
        return live.peak + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_a_training_step_for_any_number_of_bins(digits: Splits, tmp_path: Path) -> None:
    unet = {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}
    values = {"unet": unet, "scheduler": {"num_train_timesteps": 32}}
    denoiser = DDPM.from_scratch(PretrainSettings.model_validate(values), out_seed=0)

    def step() -> None:
        student = denoiser.student().train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        average = [parameter.detach().clone() for parameter in student.parameters()]
        x, t = torch.randn(64, 1, 8, 8), torch.full((64,), 3)
        for _ in range(2):
            (denoiser.predict(student, x, t, {}) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        del average

    def compare(bins: int, num_images: int) -> Callable[[], object]:
        settings = SimilaritySettings(bins=bins, num_images=num_images)
        return lambda: write_similarity(tmp_path / "s.npz", denoiser, digits["train"], settings, batch_size=64)

    compare(1, 1)()  # caches and imports
    trained = peak(denoiser, step)
    few, many = peak(denoiser, compare(2, 4)), peak(denoiser, compare(12, 4))
    assert read_figure(tmp_path / "s.npz").arrays["cosine"].shape == (12, 12)
    assert max(peak(denoiser, compare(1, 64)), many) <= 1.5 * trained
    assert many - few < 0.6 * 12 * 4 * 4096 * 4  # the size of the sketches


def test_file_of_sketches_is_neither_read_whole_nor_mapped(tmp_path: Path) -> None:
    bins, groups, size = 400, 8, 4096
    pytest.importorskip("resource")
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from deme_diffusion.analysis.sketch import Sketches
bins, groups, size = map(int, sys.argv[2:])
sketches = Sketches(Path(sys.argv[1]), bins, [1] * groups, size, {})
draw = np.random.default_rng(0)
few = draw.normal(size=(groups, size))
for i in range(bins):
    for group in range(groups):
        sketches.put(group, few[group] * (i + 1))
    sketches.close_bin(1.0)
    if not i:
        compared = Sketches(Path(sys.argv[1]), 1, [1] * groups, size, {}).compared()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cosine, cross = sketches.compared()
assert cosine.min() > 0.999 and np.ptp(cross) < 1e-3
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024))
"""
    arguments = [sys.executable, "-c", script, str(tmp_path), *map(str, (bins, groups, size))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    held = (tmp_path / Sketches.DATA).stat().st_size
    assert held == bins * groups * size * 4  # what the figure takes on disk while it is made
    assert int(done.stdout) < 0.3 * held  # resident pages, those of mapped files included


# the drawing


def data(bins: int, name: str = "[0,1000)", lo: int = 0, hi: int = 1000, **meta: Any) -> FigureData:
    draw = np.random.default_rng(bins)
    cosine = cosines(draw.normal(size=(bins, 6)) + 0.5)
    told = {"name": name, "edges": "timestep", "num_images": 8, "split": "train", "parameters": 1000, "sketch": 64}
    cross, error = draw.uniform(-0.2, 1, (bins, bins)), draw.uniform(0.01, 0.5, bins)
    told |= {"groups": 8, **summary(cosine, cross, error, 0.125), **meta}
    edges = np.linspace(lo, hi, bins + 1).round()
    return FigureData("similarity", told, {"cosine": cosine, "edges": edges, "cross": cross, "cross_error": error})


@pytest.mark.parametrize("bins", [1, 2, 1000])
def test_pictures_of_few_and_many_bins(bins: int) -> None:
    (picture,) = pictures([data(bins)])
    drawn = svg_of(picture.draw, picture.width, picture.height)
    assert 5_000 < len(drawn) < 250_000
    assert f"{100 * data(bins).meta['conflicting']:.0f}%" in picture.caption
    assert ("show means" in picture.caption) == (bins == 1000)
    finding, made = picture.caption.split("\n")
    assert "On these 8 images and their noise" in finding and f" of {bins} bins" in finding
    assert "train images" in made and "8 groups" in made


@pytest.mark.parametrize("ranges", [2, 8])
def test_picture_of_ranges_is_one(ranges: int) -> None:
    parts = [data(20), *(data(20, f"[{i},{i + 1})", i, i + 1) for i in range(ranges - 1))]
    parts.append(data(9, "[0,50)+[300,400)+[900,950)", 0, 200, edges="position in the subset"))
    (picture,) = pictures(parts)
    assert all(part.meta["name"] in picture.alt for part in parts)
    if ranges <= 4:
        assert all(part.meta["name"] in picture.caption for part in parts)
    assert len(picture.caption.split()) <= 100
    assert png_of(picture.draw, picture.width, picture.height)[:4] == b"\x89PNG"
    assert len(svg_of(picture.draw, picture.width, picture.height)) < 260_000


def test_thinned_matrix_has_the_same_mean() -> None:
    matrix = np.random.default_rng(0).normal(size=(12, 12))
    assert thinned(matrix, 12) is matrix
    np.testing.assert_allclose(thinned(matrix, 3), matrix.reshape(3, 4, 3, 4).mean(axis=(1, 3)))
    assert thinned(matrix, 5).shape == (5, 5)


def test_caption_says_what_is_determined() -> None:
    (picture,) = pictures([data(4, error=0.0)])
    assert "No projection" in picture.caption and "Projected" not in picture.caption
    (picture,) = pictures([data(4, determined=3, expected=0.5, expected_least=0.25, expected_most=0.75)])
    assert "Of expected gradients 50% (25% to 75%) do, by the 3 of 4 bins that stand out" in picture.caption
    lacking = data(4, determined=1)
    few = FigureData("similarity", {k: v for k, v in lacking.meta.items() if k[:8] != "expected"}, lacking.arrays)
    (picture,) = pictures([few])
    assert "Whether expected gradients do is not determined: 1 of 4 bins stand out from noise." in picture.caption


@pytest.mark.parametrize(("cross", "error"), [(0.0, np.inf), (0.0, 0.0), (1.0, 0.0), (-0.5, 0.01), (0.5, 0.001)])
def test_pictures_of_any_standard_error(cross: float, error: float) -> None:
    arrays = {"cross": np.full((4, 4), cross), "cross_error": np.full(4, error)}
    whole = data(4)
    (picture,) = pictures([FigureData("similarity", whole.meta, {**whole.arrays, **arrays})])
    assert len(svg_of(picture.draw, picture.width, picture.height)) > 5_000


def test_data_that_lack_something_are_refused(tmp_path: Path) -> None:
    good = data(4)
    for name in good.arrays:
        left = {key: value for key, value in good.arrays.items() if key != name}
        with pytest.raises(UserError, match=f"no {name} in it"):
            pictures([FigureData("similarity", good.meta, left)])
    for name, array in (("edges", np.arange(4)), ("cross", np.zeros((4, 3))), ("cosine", np.zeros((0, 0)))):
        with pytest.raises(UserError, match="belongs there"):
            pictures([FigureData("similarity", good.meta, {**good.arrays, name: array})])
    with pytest.raises(UserError, match=r"no .*conflicting"):
        pictures([FigureData("similarity", {"name": "[0,4)", "edges": "timestep"}, good.arrays)])
    (tmp_path / "s.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="no figure's data"):
        read_figure(tmp_path / "s.npz")


def test_drawing_needs_no_torch(digits: Splits, tmp_path: Path) -> None:
    figure(tmp_path / "s.npz", digits["train"])
    whole = data(6)
    write_figure(tmp_path / "t.npz", "similarity", whole.meta, **whole.arrays)
    script = """
import json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Refusing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers"):
            raise ImportError(name)

sys.meta_path.insert(0, Refusing())
from deme_diffusion.report.drawing.gallery import draw_figures
folder = Path(sys.argv[1])
print(json.dumps(draw_figures(folder / "run", {"similarity": {n: folder / f"{n}.npz" for n in ("s", "t")}})))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    (picture,) = json.loads(done.stdout)
    assert picture["name"] == "similarity" and picture["data"] == ["figures/s.npz", "figures/t.npz"]
    assert (tmp_path / "run" / picture["svg"]).read_text().startswith("<?xml")
    assert (tmp_path / "run" / picture["png"]).stat().st_size > 10_000
