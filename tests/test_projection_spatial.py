"""Spatial projections: a depthwise 3x3 convolution that is the identity at start, is merged like D, and never folds."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import nn

from conftest import component, make_pico_denoiser
from deme_diffusion import attach_projection, merge_checkpoints
from deme_diffusion.config import MethodOptions
from deme_diffusion.config.training import DecoupleSettings
from deme_diffusion.errors import UserError
from deme_diffusion.merging.apply import Merger
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.models import projection
from deme_diffusion.models.conversion import write_public
from deme_diffusion.models.placement import folding, is_spatial, place_of, projections
from deme_diffusion.models.projection import Projected, attach, attached, extra_parameters, fold, fold_into
from deme_diffusion.weights import WEIGHTS_NAME, State, load_state, save_state
from test_projection import attention_unet, inputs, randomise

PLACEMENTS = pytest.mark.parametrize("placement", ["residual", "block"])
AXES = pytest.mark.parametrize("axes", ["spatial", "both"])


def unet(dtype: torch.dtype = torch.float64) -> UNet2DModel:
    """With attention, whose `to_out.0` is linear, and up blocks of which one folds."""
    return attention_unet("conv").to(dtype)


def answer(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(*inputs(next(module.parameters()).dtype)).sample
    return result


def drawn(module: nn.Module, placement: str, axes: str, scale: float = 0.3) -> State:
    """Random D of every place."""
    return randomise(Projected(copy.deepcopy(module), placement, axes), scale)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-12 * other.abs().max())


# -- where, and what it computes -------------------------------------------------------------------


@PLACEMENTS
@AXES
def test_the_identity_at_start_changes_no_bit(placement: str, axes: str) -> None:
    module = unet(torch.float32)
    projected = Projected(copy.deepcopy(module), placement, axes)
    assert not any(matrix.any() for matrix in projected.projection.matrices)
    assert torch.equal(answer(projected), answer(module))


def test_convolutions_and_blocks_get_a_spatial_one_after_their_channel_wise_one_and_linear_layers_none() -> None:
    module = unet()
    both, channel = projections(module, "residual", "both"), projections(module, "residual")
    assert [name for name in both if not is_spatial(name)] == channel
    without = {place for place in channel if f"{place}|spatial" not in both}
    assert without == {place for place in channel if isinstance(module.get_submodule(place), nn.Linear)} != set()
    assert all(both[both.index(name) - 1] == place_of(name) for name in both if is_spatial(name))
    assert projections(module, "residual", "spatial") == [name for name in both if is_spatial(name)]
    assert projections(module, "block", "spatial") == [f"{place}|spatial" for place in projections(module, "block")]
    assert projections(module, "none", "spatial") == []


def test_a_model_whose_places_are_all_linear_has_no_spatial_projection() -> None:
    from diffusers.models.attention_processor import Attention

    with pytest.raises(
        UserError, match=r"projection_axes: spatial: no convolution among the places of residual .*use "
    ):
        Projected(nn.Sequential(Attention(4, heads=1, dim_head=4)), "residual", "spatial")


@pytest.mark.parametrize("place", ["mid_block.resnets.0.conv2", "mid_block"])
def test_channels_are_mixed_first_and_then_each_is_convolved_with_its_own_kernel(place: str) -> None:
    module, random = unet(), torch.Generator().manual_seed(3)
    d = 0.3 * torch.randn(8, 8, generator=random, dtype=torch.float64)
    s = 0.3 * torch.randn(8, 1, 3, 3, generator=random, dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}
    target = module.get_submodule(place)
    target.register_forward_hook(lambda _, given, y: seen.update(plain=y))
    attach(module, {f"{place}|spatial": s, place: d})  # whatever their order in the file
    target.register_forward_hook(lambda _, given, y: seen.update(projected=y))
    answer(module)

    y = torch.einsum("oc,bchw->bohw", torch.eye(8, dtype=d.dtype) + d, seen["plain"])
    padded = F.pad(y, (1, 1, 1, 1))
    height, width = y.shape[2:]
    z = y.clone()
    for i in range(3):
        for j in range(3):
            z += s[:, 0, i, j, None, None] * padded[:, :, i : i + height, j : j + width]
    assert close(seen["projected"], z)


@PLACEMENTS
@AXES
def test_every_kernel_gets_a_gradient_and_the_component_keeps_its_stock_keys(placement: str, axes: str) -> None:
    module = unet(torch.float32)
    stock = set(module.state_dict())
    projected = Projected(module, placement, axes)
    projected(*inputs(torch.float32)).sample.square().sum().backward()
    assert all(matrix.grad is not None and matrix.grad.any() for matrix in projected.projection.matrices)
    assert set(projected.component.state_dict()) == stock


# -- folding, files --------------------------------------------------------------------------------


@PLACEMENTS
@AXES
def test_attaching_all_and_folding_what_folds_are_the_trained_model(placement: str, axes: str, tmp_path: Path) -> None:
    module = unet()
    projected = Projected(copy.deepcopy(module), placement, axes)
    names = randomise(projected)
    projection.save(tmp_path, names)
    assert set(projection.load(tmp_path)) == set(names)
    expected = answer(projected)
    hooked = attach_projection(copy.deepcopy(module), tmp_path)
    assert torch.equal(answer(hooked), expected)
    assert extra_parameters(hooked) == sum(tensor.numel() for tensor in names.values())

    folded = fold_into(copy.deepcopy(module), tmp_path)
    assert close(answer(folded), expected)
    stay = {name for name in names if is_spatial(name)} | (
        {name for name, onto in folding(names, module.state_dict()).items() if not onto}
        if placement == "block"
        else set()
    )
    assert set(attached(folded)) == stay


def test_a_spatial_projection_alone_folds_nowhere() -> None:
    module = unet()
    with pytest.raises(ValueError, match=r"conv_in\|spatial: a projection there folds into no weight"):
        fold(module.state_dict(), {"conv_in|spatial": torch.zeros(4, 1, 3, 3)})


def test_a_block_s_channels_do_not_fold_past_a_spatial_one_of_the_operation_that_ends_it(tmp_path: Path) -> None:
    module, random, end = unet(), torch.Generator().manual_seed(5), "up_blocks.0.upsamplers.0.conv"
    given = {
        "up_blocks.0": 0.3 * torch.randn(8, 8, generator=random).double(),
        end: 0.3 * torch.randn(8, 8, generator=random).double(),
        f"{end}|spatial": 0.3 * torch.randn(8, 1, 3, 3, generator=random).double(),
    }
    projection.save(tmp_path, given)
    expected = answer(attach_projection(copy.deepcopy(module), tmp_path))
    folded = fold_into(copy.deepcopy(module), tmp_path)
    assert close(answer(folded), expected)
    assert set(attached(folded)) == {"up_blocks.0", f"{end}|spatial"}
    del given[f"{end}|spatial"]
    assert all(folding(given, module.state_dict()).values())


def test_a_copy_and_a_new_dtype_keep_both_kinds() -> None:
    module = unet()
    names = drawn(module, "block", "both")
    attach(module, names)
    before, other = answer(module), copy.deepcopy(module)
    attach(module, {})
    assert torch.equal(answer(other), before)
    assert not attached(module) and torch.equal(answer(module), answer(unet()))
    assert all(tensor.dtype == torch.float32 for tensor in attached(other.float()).values())


def test_three_lines_in_a_fresh_process_load_the_same_model(tmp_path: Path) -> None:
    module = unet(torch.float32)
    module.save_config(tmp_path / "unet")
    save_state(tmp_path / "unet" / WEIGHTS_NAME, module.state_dict())
    projection.save(tmp_path / "unet", drawn(module, "residual", "both"))
    torch.save(inputs(torch.float32), tmp_path / "inputs.pt")
    lines = f"""
import torch
from diffusers import UNet2DModel
from deme_diffusion import attach_projection, merge_checkpoints
torch.set_num_threads(1)
unet = attach_projection(UNet2DModel.from_pretrained({str(tmp_path / "unet")!r}), {str(tmp_path)!r})
with torch.no_grad():
    torch.save(unet(*torch.load({str(tmp_path / "inputs.pt")!r})).sample, {str(tmp_path / "answer.pt")!r})
"""
    subprocess.run([sys.executable, "-c", lines], check=True)
    expected = answer(attach_projection(module, tmp_path))
    assert torch.equal(torch.load(tmp_path / "answer.pt"), expected)
    assert not torch.equal(answer(unet(torch.float32)), expected)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"mid_block|spatial": (8, 8)}, r"mid_block\|spatial is \(8, 8\), but .* which asks for \(8, 1, 3, 3\)"),
        ({"mid_block|spatial": (4, 1, 3, 3)}, r"is \(4, 1, 3, 3\), but the UNet2DModel has 8 channels there"),
        ({"mid_block": (8, 1, 3, 3)}, r"mid_block is \(8, 1, 3, 3\), but the UNet2DModel has 8 channels there"),
        ({"mid_blok|spatial": (8, 1, 3, 3)}, r"mid_blok is no convolution or block of"),
        ({"mid_block.attentions.0.to_out.0|spatial": (8, 1, 3, 3)}, r"to_out\.0 is no convolution or block of"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, names: dict[str, tuple[int, ...]], message: str) -> None:
    projection.save(tmp_path, {name: torch.zeros(shape) for name, shape in names.items()})
    for put in (attach_projection, fold_into):
        with pytest.raises(UserError, match=message):
            put(unet(), tmp_path)


def test_axes_without_a_place_are_refused_in_the_settings() -> None:
    with pytest.raises(ValueError, match="projection_axes=both: projection=none has no place; residual or block"):
        DecoupleSettings(projection="none", projection_axes="both")


def test_the_public_code_has_no_spatial_adapters(tmp_path: Path) -> None:
    module = make_pico_denoiser().module
    module.save_config(tmp_path / "unet")  # type: ignore[operator]
    save_state(tmp_path / "unet" / WEIGHTS_NAME, module.state_dict())
    width = module.config.block_out_channels[-1]  # type: ignore[union-attr, index]
    projection.save(tmp_path / "unet", {"mid_block|spatial": torch.ones(width, 1, 3, 3)})
    with pytest.raises(UserError, match=r"a projection after mid_block\|spatial .*the public code has none"):
        write_public(tmp_path / "unet", tmp_path / "public.bin")


# -- merging ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return component(tmp_path_factory.mktemp("merge") / "base", unet().state_dict())


def expert(folder: Path, placement: str, axes: str, seed: int, keep: slice = slice(None)) -> tuple[Path, State, State]:
    """A component folder whose weights and D differ from the base's everywhere."""
    module, random = unet(), torch.Generator().manual_seed(seed)
    state = {k: v + 0.05 * torch.randn(v.shape, generator=random).double() for k, v in module.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in drawn(module, placement, axes).items()}
    names = {name: 0.1 * torch.randn(shape, generator=random).double() for name, shape in list(shapes.items())[keep]}
    projection.save(component(folder, state), names)
    return folder, state, names


@PLACEMENTS
@AXES
def test_the_merged_model_is_the_merged_weights_under_identity_plus_the_sum_of_w_d(
    base: Path, tmp_path: Path, placement: str, axes: str
) -> None:
    one = expert(tmp_path / "one", placement, axes, 1)
    two = expert(tmp_path / "two", placement, axes, 2, slice(1, None))  # one place of it has none
    w = (0.7, -0.4)
    with Merger(base, [one[0], two[0]]) as merger:
        merged = merger.into(unet(), w)
    start = unet().state_dict()
    plain = unet()
    plain.load_state_dict({k: v + sum(x * (own[k] - v) for x, own in zip(w, (one[1], two[1]), strict=True))
                           for k, v in start.items()})  # fmt: skip
    summed = {k: sum(x * own[k] for x, own in zip(w, (one[2], two[2]), strict=True) if k in own) for k in one[2]}
    expected = attach(plain, {k: torch.as_tensor(v) for k, v in summed.items()})
    assert close(answer(merged), answer(expected))
    assert {name for name in attached(merged) if is_spatial(name)} == {name for name in one[2] if is_spatial(name)}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "della", "breadcrumbs", "tsv", "wudi"])
def test_every_method_merges_kernels_as_parameters_and_weights_of_zero_are_the_base(
    base: Path, tmp_path: Path, method: str
) -> None:
    (one, _, names), (two, *_) = (expert(tmp_path / str(i), "residual", "both", i) for i in range(2))
    with Merger(base, [one, two], method) as merger:
        assert merger.unfolded([0.0, 0.0]) == {}
        assert torch.equal(answer(merger.into(unet(), [0.0, 0.0])), answer(unet()))
        rest = merger.unfolded([0.5, 0.5])
    assert set(rest) == {name for name in names if is_spatial(name)}
    assert all(tensor.any() and tensor.shape == names[name].shape for name, tensor in rest.items())


@pytest.mark.parametrize(
    "method, options, weights",
    [
        ("task_arithmetic", {}, [0.5, 0.5]),
        ("average", {}, [0.5, 0.5]),
        ("dare_linear", {"density": 1.0}, [0.25, 0.75]),
        ("ties", {"density": 1.0}, [1.0, 1.0]),
    ],
)
def test_copies_of_one_expert_merge_into_that_expert(
    base: Path, tmp_path: Path, method: str, options: dict[str, float], weights: list[float]
) -> None:
    folder, state, names = expert(tmp_path / "one", "residual", "both", 1)
    with Merger(base, [folder, folder], method, MethodOptions.model_validate(options)) as merger:
        merged = merger.into(unet(), weights)
    trained = unet()
    trained.load_state_dict(state)
    assert close(answer(merged), answer(attach(trained, names)))


def test_kept_places_and_patterns_reach_the_spatial_ones(base: Path, tmp_path: Path) -> None:
    one, two = (expert(tmp_path / str(i), "block", "both", i) for i in range(2))
    weights = MergeWeights((0.5, 0.5), {"up_blocks.1.*": (0.2, 0.3)}, {"down_blocks.0.*": 1, "mid_block.*": "base"})
    with Merger(base, [one[0], two[0]]) as merger:
        rest = merger.unfolded(weights)
    assert torch.equal(rest["down_blocks.0|spatial"], two[2]["down_blocks.0|spatial"])
    assert not any(name.startswith("mid_block") for name in rest)
    expected = 0.2 * one[2]["up_blocks.1|spatial"] + 0.3 * two[2]["up_blocks.1|spatial"]
    assert torch.allclose(rest["up_blocks.1|spatial"], expected)


def test_a_merge_of_files_leaves_them_beside_the_weights_and_in_the_record(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [expert(tmp_path / str(i), "residual", "both", i) for i in range(2)]
    merged = merge_checkpoints(base, [path for path, *_ in paths], tmp_path / "merged", weights=[0.3, 0.6])
    one, two = (names for _, _, names in paths)
    rest = load_state(tmp_path / "merged" / projection.FILE)
    assert set(rest) == {name for name in one if is_spatial(name)}
    for name, tensor in rest.items():
        torch.testing.assert_close(tensor, 0.3 * one[name] + 0.6 * two[name])
    seen = merged.record["statistics"]["groups"]["projection"]
    assert seen["parameters"] == sum(tensor.numel() for tensor in one.values())
    flat = [torch.cat([tensor.flatten() for tensor in names.values()]) for names in (one, two)]
    assert seen["norms"] == pytest.approx([float(each.norm()) for each in flat])
