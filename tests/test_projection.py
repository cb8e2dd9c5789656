"""Channel-wise projections: the identity changes no bit, and folding equals attaching (Sec. 3.2)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from conftest import make_pico_denoiser
from deme_diffusion.errors import UserError
from deme_diffusion.models import projection
from deme_diffusion.models.placement import residual_places
from deme_diffusion.models.projection import Projected, fold, fold_into
from deme_diffusion.weights import save_state

Places = dict[str, torch.Tensor]


def attention_unet(resampling: str, **options: Any) -> UNet2DModel:
    """A U-Net with attention on both ways and one level of resampling, by convolutions or by resnets."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 2,
        "layers_per_block": 1,
        "block_out_channels": (4, 8),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "norm_num_groups": 2,
        "attention_head_dim": 2,
        "downsample_type": resampling,
        "upsample_type": resampling,
        **options,
    }
    return UNet2DModel(**values).eval()


def randomise(projected: Projected, scale: float = 0.3) -> Places:
    """Random D in place of 0."""
    generator = torch.Generator().manual_seed(1)
    for matrix in projected.projection.matrices:
        matrix.data = scale * torch.randn(matrix.shape, generator=generator, dtype=torch.float64).to(matrix.dtype)
    return projected.projection.state()


def inputs(dtype: torch.dtype, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and t."""
    sample = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return sample.to(dtype), torch.tensor([0, 5, 19])


@pytest.mark.parametrize("resampling", ["conv", "resnet"])
def test_an_identity_projection_changes_no_bit_of_the_forward(resampling: str) -> None:
    unet = attention_unet(resampling)
    plain = unet(*inputs(torch.float32)).sample
    assert torch.equal(Projected(copy.deepcopy(unet), "residual")(*inputs(torch.float32)).sample, plain)


def test_placement_none_adds_no_parameter_and_changes_no_bit() -> None:
    unet = attention_unet("conv")
    projected = Projected(copy.deepcopy(unet), "none")
    assert len(list(projected.parameters())) == len(list(unet.parameters()))
    assert torch.equal(projected(*inputs(torch.float32)).sample, unet(*inputs(torch.float32)).sample)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("resampling", ["conv", "resnet"])
def test_folding_equals_attaching(resampling: str, dtype: torch.dtype, tolerance: float) -> None:
    unet = attention_unet(resampling).to(dtype)
    plain, before = unet(*inputs(dtype)).sample, copy.deepcopy(unet.state_dict())
    projected = Projected(unet, "residual")
    matrices = randomise(projected)
    attached = projected(*inputs(dtype)).sample

    folded = attention_unet(resampling).to(dtype)
    folded.load_state_dict(fold(before, matrices))
    answer = folded(*inputs(dtype)).sample
    scale = attached.abs().max()
    assert (answer - attached).abs().max() <= tolerance * scale
    assert (attached - plain).abs().max() > 0.01 * scale  # else D would not act at all


@pytest.mark.parametrize("resampling", ["conv", "resnet"])
def test_each_matrix_acts_on_the_output_and_folds_alone(resampling: str) -> None:
    unet = attention_unet(resampling).double()
    plain, before = unet(*inputs(torch.float64)).sample, copy.deepcopy(unet.state_dict())
    projected = Projected(unet, "residual")
    matrices = randomise(projected)
    for place, matrix in zip(projected.projection.places, projected.projection.matrices, strict=True):
        for other in projected.projection.matrices:
            other.data = matrices[place] if other is matrix else torch.zeros_like(other)
        attached = projected(*inputs(torch.float64)).sample
        folded = attention_unet(resampling).double()
        folded.load_state_dict(fold(before, {place: matrices[place]}))
        assert (attached - plain).abs().max() > 1e-6, place
        assert (folded(*inputs(torch.float64)).sample - attached).abs().max() < 1e-12 * attached.abs().max(), place


def test_residual_places_are_the_ends_of_residual_branches_and_the_resampling_convolutions() -> None:
    assert sorted(residual_places(attention_unet("conv"))) == [
        "down_blocks.0.attentions.0.to_out.0",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.0.resnets.0.conv2",
        "down_blocks.1.resnets.0.conv2",
        "mid_block.attentions.0.to_out.0",
        "mid_block.resnets.0.conv2",
        "mid_block.resnets.1.conv2",
        "up_blocks.0.resnets.0.conv2",
        "up_blocks.0.resnets.1.conv2",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1.attentions.0.to_out.0",
        "up_blocks.1.attentions.1.to_out.0",
        "up_blocks.1.resnets.0.conv2",
        "up_blocks.1.resnets.1.conv2",
    ]


def test_resampling_resnets_are_places_and_their_pooling_is_not() -> None:
    places = residual_places(attention_unet("resnet", down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D")))
    assert "down_blocks.0.downsamplers.0.conv2" in places
    modules = dict(attention_unet("resnet").named_modules())
    assert all(isinstance(modules[place], nn.Conv2d | nn.Linear) for place in places if place in modules)
    assert not any(place.endswith((".upsample.conv", ".downsample.conv")) for place in places)


def test_every_matrix_is_square_in_its_place_s_channels_zero_and_trained() -> None:
    projected = Projected(attention_unet("conv"), "residual")
    modules = dict(projected.component.named_modules())
    for place, matrix in zip(projected.projection.places, projected.projection.matrices, strict=True):
        channels = modules[place].weight.shape[0]
        assert matrix.shape == (channels, channels)
        assert not matrix.any()
    projected(*inputs(torch.float32)).sample.square().sum().backward()
    assert all(matrix.grad is not None and matrix.grad.any() for matrix in projected.projection.matrices)


def test_a_module_without_a_place_is_refused() -> None:
    with pytest.raises(UserError, match="finds no place in a Sequential; use none"):
        Projected(nn.Sequential(nn.Conv2d(1, 1, 1)), "residual")


def test_an_unknown_placement_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'residual'"):
        Projected(attention_unet("conv"), "residal")


def test_folding_leaves_tensors_of_other_places_and_the_given_state_alone() -> None:
    unet = attention_unet("conv")
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    place = "mid_block.resnets.0.conv2"
    folded = fold(unet.state_dict(), {place: torch.eye(8)})
    assert torch.equal(folded[f"{place}.weight"], 2 * before[f"{place}.weight"])
    assert torch.equal(folded[f"{place}.bias"], 2 * before[f"{place}.bias"])
    changed = {key for key, value in folded.items() if not torch.equal(value, before[key])}
    assert changed == {f"{place}.weight", f"{place}.bias"}
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_matrices_survive_the_disk_and_no_matrix_leaves_no_file(tmp_path: Path) -> None:
    matrices = randomise(Projected(attention_unet("conv"), "residual"))
    projection.save(tmp_path / "some", matrices)
    loaded = projection.load(tmp_path / "some")
    assert loaded.keys() == matrices.keys()
    assert all(torch.equal(loaded[place], matrices[place]) for place in matrices)

    (tmp_path / "none").mkdir()
    projection.save(tmp_path / "none", {})
    assert list((tmp_path / "none").iterdir()) == []
    assert projection.load(tmp_path / "none") == {}


def test_folding_into_a_module_reads_the_matrices_beside_its_weights(tmp_path: Path) -> None:
    base = make_pico_denoiser().module
    projected = Projected(copy.deepcopy(base), "residual")
    matrices = randomise(projected)
    attached = projected(*inputs(torch.float32, 1)).sample
    projection.save(tmp_path / "with", matrices)
    folded = fold_into(copy.deepcopy(base), tmp_path / "with")
    torch.testing.assert_close(folded(*inputs(torch.float32, 1)).sample, attached, rtol=1e-4, atol=1e-5)
    (tmp_path / "without").mkdir()
    untouched = fold_into(copy.deepcopy(base), tmp_path / "without")
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in untouched.state_dict().items())


def test_the_component_s_weights_keep_exactly_the_stock_keys(tmp_path: Path) -> None:
    unet = attention_unet("conv")
    stock = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    projected = Projected(unet, "residual")
    randomise(projected)
    assert {key: tuple(value.shape) for key, value in projected.component.state_dict().items()} == stock

    unet.save_config(tmp_path)
    save_state(tmp_path / "diffusion_pytorch_model.safetensors", projected.component.state_dict())
    _, info = UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
