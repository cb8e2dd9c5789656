"""Entries and norms of task vectors: against numpy on states made by hand, and their pictures."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import component
from deme_diffusion.analysis import vectors
from deme_diffusion.analysis.vectors import LEVELS, forward_order, quantiles_of, write_vectors
from deme_diffusion.errors import UserError
from deme_diffusion.figure_file import FigureData, read_figure, write_figure
from deme_diffusion.models.projection import fold, save
from deme_diffusion.report.drawing.vectors import pictures
from deme_diffusion.report.figures import png_of, svg_of
from deme_diffusion.weights import State
from drawn import sizes_without_torch

BLOCK = "down_blocks.0.resnets.0.conv2"


def state(seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """A model with a convolution in a block, layers around it, and a buffer of indices."""
    made = torch.Generator().manual_seed(seed)
    shapes = {
        "conv_out.weight": (1, 6, 3, 3),
        "conv_in.weight": (6, 1, 3, 3),
        "conv_in.bias": (6,),
        f"{BLOCK}.weight": (6, 6, 3, 3),
        f"{BLOCK}.bias": (6,),
    }
    tensors = {key: torch.randn(shape, generator=made).to(dtype) for key, shape in shapes.items()}
    return {**tensors, "position_ids": torch.arange(4) + seed}


def written(path: Path, base: Path, experts: list[Path]) -> FigureData:
    """The data of a figure."""
    write_vectors(path / "vectors.npz", base, experts, names=[f"expert {i}" for i in range(len(experts))])
    return read_figure(path / "vectors.npz")


def entries(base: State, expert: State, layer: str) -> np.ndarray:
    """All entries of a layer's task vector, float64."""
    keys = [key for key in base if key.rpartition(".")[0] == layer]
    return np.concatenate([(expert[key].double() - base[key].double()).flatten().numpy() for key in keys])


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_quantiles_means_and_norms_are_numpys(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    base, experts = state(0, dtype), [state(1, dtype), state(2, dtype)]
    folders = [component(tmp_path / str(i), one, shards) for i, one in enumerate([base, *experts])]
    data = written(tmp_path, folders[0], folders[1:])
    assert data.meta["layers"] == ["conv_in", BLOCK, "conv_out"]
    assert data.meta["blocks"] == ["conv_in", "down_blocks.0", "conv_out"]
    assert data.arrays["entries"].tolist() == [60, 330, 54]
    zero = {key: torch.zeros_like(tensor) for key, tensor in base.items()}
    for k, layer in enumerate(data.meta["layers"]):
        theta = entries(zero, base, layer)
        assert data.arrays["base_rms"][k] == pytest.approx(np.sqrt(np.mean(theta**2)))
        for i, expert in enumerate(experts):
            tau = entries(base, expert, layer)
            np.testing.assert_allclose(data.arrays["quantiles"][i, k], np.quantile(tau, LEVELS), rtol=1e-5, atol=1e-7)
            assert data.arrays["mean_absolute"][i, k] == pytest.approx(np.abs(tau).mean())
            relative = np.linalg.norm(tau) / np.linalg.norm(theta)
            assert data.arrays["relative_norms"][i, k] == pytest.approx(relative)
    whole = [np.concatenate([entries(base, expert, layer) for layer in data.meta["layers"]]) for expert in experts]
    cosine = whole[0] @ whole[1] / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1])
    assert data.meta["whole"]["cosines"][0][1] == pytest.approx(cosine)
    assert data.meta["whole"]["norms"] == pytest.approx([np.linalg.norm(tau) for tau in whole])


def test_a_projection_that_folds_is_in_the_weight(tmp_path: Path) -> None:
    base, expert = state(0), state(1)
    matrix = 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    bases, beside = component(tmp_path / "base", base), component(tmp_path / "beside", expert)
    save(beside, {BLOCK: matrix})
    folded = component(tmp_path / "folded", fold(expert, {BLOCK: matrix}))
    one, other = written(tmp_path, bases, [beside]), written(tmp_path, bases, [folded])
    assert one.meta["layers"] == other.meta["layers"]
    assert (one.meta["folded"], other.meta["folded"]) == ([BLOCK], [])
    assert "with the projections that fold into them" in pictures([one])[0].caption
    assert "that fold" not in pictures([other])[0].caption + pictures([other])[1].caption
    np.testing.assert_allclose(one.arrays["quantiles"], other.arrays["quantiles"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(one.arrays["relative_norms"], other.arrays["relative_norms"], rtol=1e-6)


def test_a_projection_that_stays_is_a_layer_of_its_own(tmp_path: Path) -> None:
    base, matrix = state(0), torch.arange(36.0).reshape(6, 6)
    folders = [component(tmp_path / name, base) for name in ("base", "one", "two")]
    save(folders[1], {"down_blocks.0": matrix})
    data = written(tmp_path, folders[0], folders[1:])
    assert data.meta["layers"][-1] == "projection.down_blocks.0"
    assert data.meta["blocks"][-1] == "projection"
    np.testing.assert_allclose(data.arrays["quantiles"][0, -1], np.quantile(matrix, LEVELS))
    assert not data.arrays["quantiles"][1].any()
    assert np.isnan(data.arrays["relative_norms"][:, -1]).all()
    assert data.meta["whole"]["relative_norms"] == [0, 0]
    assert "Projections" in pictures([data])[1].caption


def test_the_median_is_over_layers_that_some_expert_changes(tmp_path: Path) -> None:
    base = state(0)
    key = next(key for key in base if key.endswith("weight"))
    moved = {**base, key: base[key] + 0.5}
    folders = [component(tmp_path / name, own) for name, own in (("base", base), ("one", moved), ("two", base))]
    data = written(tmp_path, folders[0], folders[1:])
    caption = pictures([data])[0].caption
    assert f" 1 of {len(data.meta['layers'])} layers are changed by some expert" in caption
    (mean,) = (float(value) for value in data.arrays["mean_absolute"][0] if value)
    assert f"mean |τ_i| is {mean:.2g}, 0, expert by expert" in caption


def test_an_expert_that_equals_the_base_has_zeros(tmp_path: Path) -> None:
    folders = [component(tmp_path / name, state(0)) for name in ("base", "one", "two")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = written(tmp_path, folders[0], folders[1:])
        for picture in pictures([data]):
            assert png_of(picture.draw, picture.width, picture.height).startswith(b"\x89PNG")
    assert not data.arrays["quantiles"].any()
    assert not data.arrays["relative_norms"].any()
    assert "is 0 for expert 0, 0 for expert 1." in pictures([data])[1].caption


def test_of_a_large_layer_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    tau = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    exact = quantiles_of(tau, "conv")
    monkeypatch.setattr(vectors, "MOST", 49_999)
    monkeypatch.setattr(vectors, "SAMPLE", 20_000)
    sampled = quantiles_of(tau, "conv")
    assert not np.array_equal(sampled, exact)
    np.testing.assert_allclose(sampled, exact, atol=0.1)
    np.testing.assert_array_equal(sampled, quantiles_of(tau, "conv"))


# --- bad input ----------------------------------------------------------------------------------------------------


def test_keys_that_differ_are_told_in_one_line(tmp_path: Path) -> None:
    expert = state(1)
    expert["conv_inn.bias"] = expert.pop("conv_in.bias")
    folders = [component(tmp_path / "base", state(0)), component(tmp_path / "other", expert)]
    with pytest.raises(UserError, match=r"keys differ .*conv_in\.bias.*conv_inn\.bias") as told:
        written(tmp_path, folders[0], folders[1:])
    assert "\n" not in str(told.value)
    assert not (tmp_path / "vectors.npz").exists()


def test_nan_in_an_expert_is_named_but_not_a_mask_that_all_share(tmp_path: Path) -> None:
    base, expert = (one | {"mask": torch.full((3, 3), -torch.inf)} for one in (state(0), state(1)))
    folders = [component(tmp_path / "base", base), component(tmp_path / "good", expert)]
    assert "mask" not in written(tmp_path, folders[0], folders[1:]).meta["layers"]
    expert["conv_in.bias"][2] = torch.nan
    broken = component(tmp_path / "broken", expert)
    with pytest.raises(UserError, match=r"conv_in\.bias: NaN or infinity in .*broken"):
        written(tmp_path, folders[0], [folders[1], broken])


# --- order --------------------------------------------------------------------------------------------------------


def test_layers_are_in_the_order_of_the_forward() -> None:
    forward = ["conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0.norm1", "down_blocks.0.resnets.0.conv2"]
    forward += ["down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    forward += [
        "down_blocks.0.attentions.0.proj_out",
        "down_blocks.0.resnets.1.conv1",
        "down_blocks.0.downsamplers.0.conv",
    ]
    forward += ["down_blocks.1.resnets.0.conv1", "mid_block.resnets.0.conv1", "mid_block.attentions.0.to_q"]
    forward += ["mid_block.resnets.1.conv1", "up_blocks.0.resnets.0.conv1", "up_blocks.0.upsamplers.0.conv"]
    forward += ["conv_norm_out", "conv_out", "projection.down_blocks.0"]
    assert sorted(set(forward), key=forward_order) == forward
    generic = ["pos_embed.proj", "transformer_blocks.2.ff", "transformer_blocks.10.ff", "norm_out.linear", "proj_out"]
    assert sorted(set(generic), key=forward_order) == generic


# --- the pictures -------------------------------------------------------------------------------------------------


def figure(path: Path, experts: int, layers: int, spread: float = 0.3) -> FigureData:
    """Data as `write_vectors` leaves it, of random numbers; four layers a block."""
    rng = np.random.default_rng(0)
    scale = 1e-4 * np.exp(spread * rng.normal(size=(experts, layers)))
    blocks = -(-layers // 4)
    norms, names = 0.001 + 0.02 * rng.random((experts, blocks)), [f"expert {i} [{i},{i + 1})" for i in range(experts)]
    whole = {"relative_norms": norms.mean(1).tolist(), "cosines": np.eye(experts).tolist(), "share_seen": 0.07}
    told = {
        "names": names,
        "layers": [f"down_blocks.{k // 4}.layer{k}" for k in range(layers)],
        "blocks": [f"down_blocks.{k}" for k in range(blocks)],
        "of_block": [k // 4 for k in range(layers)],
        "folded": ["down_blocks.0.resnets.0.conv2"] * (experts > 1),
        "sampled": ["down_blocks.0.layer0"],
        "sample": 2**20,
        "whole": whole,
    }
    quantiles = scale[:, :, None] * np.array([-2.3, -1.6, -0.7, 0, 0.7, 1.6, 2.3])
    arrays = {"quantiles": quantiles, "mean_absolute": scale, "relative_norms": norms}
    write_figure(path, "vectors", told, **arrays)
    return read_figure(path)


@pytest.mark.parametrize(("experts", "layers", "spread"), [(1, 1, 0.0), (4, 60, 0.3), (4, 300, 2.0), (10, 61, 0.3)])
def test_one_and_many_layers_are_drawn_small(tmp_path: Path, experts: int, layers: int, spread: float) -> None:
    found = pictures([figure(tmp_path / "v.npz", experts, layers, spread)])
    assert [picture.name for picture in found] == ["vectors", "vectors-norms"]
    for picture in found:
        assert len(svg_of(picture.draw, picture.width, picture.height)) < 250_000
        assert picture.height < 9
    assert ("Boxes" in found[0].caption) == (layers <= 60)
    assert ("logarithmic" in found[0].caption) == (spread == 2.0)
    assert "1,048,576 sampled" in found[0].caption
    assert all(len(picture.caption.split()) <= 90 for picture in found)


def test_data_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    data = figure(tmp_path / "v.npz", 3, 8)
    arrays = {**data.arrays, "relative_norms": data.arrays["relative_norms"][:2]}
    with pytest.raises(UserError, match=r"v\.npz: relative_norms is of shape \(2, 2\); \(3, 2\) belongs there"):
        pictures([replace(data, arrays=arrays)])
    with pytest.raises(UserError, match=r"v\.npz: no quantiles, relative_norms in it"):
        pictures([replace(data, arrays={"mean_absolute": data.arrays["mean_absolute"]})])


def test_the_pictures_need_no_torch(tmp_path: Path) -> None:
    figure(tmp_path / "v.npz", 3, 8)
    sizes = sizes_without_torch(tmp_path / "v.npz")
    assert list(sizes) == ["vectors", "vectors-norms"] and min(sizes.values()) > 10_000
