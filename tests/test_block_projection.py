"""The paper's placement: P after every block, skip connections unprojected; what folds is folded, the rest loads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from conftest import make_pico_denoiser
from deme_diffusion import attach_projection
from deme_diffusion.division import uniform
from deme_diffusion.errors import UserError
from deme_diffusion.models import projection
from deme_diffusion.models.ensemble import RoutedEnsemble
from deme_diffusion.models.placement import block_places, foldable
from deme_diffusion.models.projection import FILE, Projected, attach, attached, extra_parameters, fold, fold_into
from deme_diffusion.weights import WEIGHTS_NAME, State, save_state

DOWN, UP = "DownBlock2D", "UpBlock2D"
ATTENTION = {"down_block_types": ("AttnDownBlock2D", DOWN, DOWN), "up_block_types": (UP, UP, "AttnUpBlock2D")}
UNCONDITIONAL: dict[str, dict[str, Any]] = {
    "plain": {"down_block_types": (DOWN,) * 3, "up_block_types": (UP,) * 3},
    "attention": ATTENTION,
    "resnets": {
        "down_block_types": ("AttnDownBlock2D", DOWN, DOWN),
        "up_block_types": ("AttnUpBlock2D", UP, UP),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "no middle": {**ATTENTION, "mid_block_type": None},
    "skip": {
        "down_block_types": ("SkipDownBlock2D",) * 3,
        "up_block_types": ("SkipUpBlock2D",) * 3,
    },
    "resampling blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", DOWN, DOWN),
        "up_block_types": (UP, UP, "ResnetUpsampleBlock2D"),
    },
}
FOLDS = {"plain": 3, "attention": 2, "resnets": 2, "no middle": 2, "skip": 1, "resampling blocks": 3, "condition": 2}
"""Of three up blocks: the last resnets' shortcut and upsampling convolutions, but no attention and no resnets."""


def unconditional(name: str, dtype: torch.dtype = torch.float64) -> UNet2DModel:
    torch.manual_seed(0)
    widths: dict[str, Any] = {"block_out_channels": (4, 8, 8), "norm_num_groups": 2, "attention_head_dim": 2}
    options = {"sample_size": 8, "in_channels": 3, "layers_per_block": 1, **widths, **UNCONDITIONAL[name]}
    return UNet2DModel(**options).to(dtype).eval()


def conditional(dtype: torch.dtype = torch.float64) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(4, 8, 8),
            norm_num_groups=2,
            attention_head_dim=2,
            cross_attention_dim=5,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", DOWN),
            up_block_types=(UP, "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        )
        .to(dtype)
        .eval()
    )


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return conditional(dtype) if name == "condition" else unconditional(name, dtype)


def inputs(name: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """x_t, t, and the captions' embeddings where the model takes any."""
    random = torch.Generator().manual_seed(2)
    x_t, text = torch.randn(3, 3, 8, 8, generator=random), torch.randn(3, 4, 5, generator=random)
    return (x_t.to(dtype), torch.tensor([0, 5, 19]), *([text.to(dtype)] if name == "condition" else []))


def answer(module: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(*inputs(name, next(module.parameters()).dtype)).sample
    return result


def randomised(projected: Projected, seed: int = 1, scale: float = 0.3) -> State:
    random = torch.Generator().manual_seed(seed)
    for matrix in projected.projection.matrices:
        matrix.data = (scale * torch.randn(matrix.shape, generator=random)).to(matrix.dtype)
    return projected.projection.state()


@torch.no_grad()
def by_hand(unet: Any, matrices: State, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor | None = None) -> Any:
    """The U-Net's forward, block by block, with P y after each block, and skip connections that never see P."""

    def project(place: str, y: torch.Tensor) -> torch.Tensor:
        p = torch.eye(y.shape[1], dtype=y.dtype) + matrices[place]
        return torch.einsum("oc,bchw->bohw", p, y)

    def options(block: Any) -> dict[str, Any]:
        return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}

    embedding = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    y, image = unet.conv_in(x), x
    skips = [y]
    for i, block in enumerate(unet.down_blocks):
        if hasattr(block, "skip_conv"):
            y, states, image = block(y, embedding, image)
        else:
            y, states = block(y, embedding, **options(block))
        skips += states
        y = project(f"down_blocks.{i}", y)
    if unet.mid_block is not None:
        y = project("mid_block", unet.mid_block(y, embedding, **options(unet.mid_block)))
    image = None
    for i, block in enumerate(unet.up_blocks):
        states, skips = tuple(skips[-len(block.resnets) :]), skips[: -len(block.resnets)]
        if hasattr(block, "skip_conv"):
            y, image = block(y, states, embedding, image)
        else:
            y = block(y, states, embedding, **options(block))
        y = project(f"up_blocks.{i}", y)
    y = unet.conv_out(unet.conv_act(unet.conv_norm_out(y)))
    return y if image is None else y + image


ALL = pytest.mark.parametrize("name", [*UNCONDITIONAL, "condition"])


# where


def on_meta(kind: Callable[..., nn.Module], **options: Any) -> dict[str, bool]:
    with torch.device("meta"):
        return foldable(kind(**options))


def test_six_of_thirteen_places_fold_on_the_lsun_model() -> None:
    folds = on_meta(
        UNet2DModel,
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        layers_per_block=2,
        attention_head_dim=None,
        down_block_types=(DOWN, DOWN, DOWN, DOWN, "AttnDownBlock2D", DOWN),
        up_block_types=(UP, "AttnUpBlock2D", UP, UP, UP, UP),
    )
    down, up = [f"down_blocks.{i}" for i in range(6)], [f"up_blocks.{i}" for i in range(6)]
    assert list(folds) == [*down, "mid_block", *up]
    assert [place for place, exact in folds.items() if exact] == up


def test_four_of_nine_places_fold_on_the_cifar10_model() -> None:
    folds = on_meta(
        UNet2DModel,
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        attention_head_dim=None,
        down_block_types=(DOWN, "AttnDownBlock2D", DOWN, DOWN),
        up_block_types=(UP, UP, "AttnUpBlock2D", UP),
    )
    assert len(folds) == 9
    assert [place for place, exact in folds.items() if exact] == [f"up_blocks.{i}" for i in range(4)]


def test_three_of_nine_places_fold_on_stable_diffusion() -> None:
    folds = on_meta(UNet2DConditionModel, cross_attention_dim=768)  # diffusers' defaults are SD 1.x otherwise
    assert len(folds) == 9
    assert [place for place, exact in folds.items() if exact] == [f"up_blocks.{i}" for i in range(3)]


@ALL
def test_places_that_fold_follow_from_how_the_up_blocks_end(name: str) -> None:
    folds = foldable(made(name))
    assert len(folds) == (6 if name == "no middle" else 7)
    assert sum(folds.values()) == FOLDS[name]
    assert all(place.startswith("up_blocks.") for place, exact in folds.items() if exact)


def test_a_block_without_resnets_is_refused() -> None:
    odd = nn.Module()
    odd.down_blocks = nn.ModuleList([nn.Conv2d(2, 2, 1)])
    with pytest.raises(UserError, match=r"down_blocks\.0 is a Conv2d without resnets; use residual or none"):
        Projected(odd, "block")


def test_a_module_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="block is of U-Nets, and a Conv2d is none; use residual or none"):
        Projected(nn.Conv2d(1, 1, 1), "block")


# training: hooks


@ALL
def test_the_forward_is_the_hand_written_one_with_unprojected_skips(name: str) -> None:
    module = made(name)
    projected = Projected(copy.deepcopy(module), "block")
    matrices = randomised(projected)
    expected = by_hand(module, matrices, *inputs(name))
    assert (answer(projected, name) - expected).abs().max() < 1e-12 * expected.abs().max()
    for place in matrices:  # each of them acts, so that none of them can be missed above
        others = {k: v if k == place else torch.zeros_like(v) for k, v in matrices.items()}
        assert (by_hand(module, others, *inputs(name)) - answer(module, name)).abs().max() > 1e-9, place


@ALL
def test_identity_projections_change_no_bit(name: str) -> None:
    module = made(name, torch.float32)
    assert torch.equal(answer(Projected(copy.deepcopy(module), "block"), name), answer(module, name))


def test_every_matrix_is_square_in_its_block_s_channels_and_gets_a_gradient() -> None:
    projected = Projected(unconditional("attention"), "block")
    shapes = {place: len(matrix) for place, matrix in projected.projection.state().items()}
    assert list(shapes) == block_places(projected.component)
    assert list(shapes.values()) == [4, 8, 8, 8, 8, 8, 4]
    projected(*inputs("attention")).sample.square().sum().backward()
    assert all(matrix.grad is not None and matrix.grad.any() for matrix in projected.projection.matrices)


# folding, and the rest


@ALL
def test_folding_what_folds_and_attaching_the_rest_is_attaching_all(name: str, tmp_path: Path) -> None:
    module = made(name)
    projected = Projected(copy.deepcopy(module), "block")
    projection.save(tmp_path, randomised(projected))
    expected = answer(projected, name)
    assert (expected - answer(module, name)).abs().max() > 0.01 * expected.abs().max()

    served = fold_into(copy.deepcopy(module), tmp_path)
    assert (answer(served, name) - expected).abs().max() < 1e-12 * expected.abs().max()
    assert set(attached(served)) == {place for place, exact in foldable(module).items() if not exact}

    hooked = attach_projection(copy.deepcopy(module), tmp_path)
    assert torch.equal(answer(hooked, name), expected)
    assert set(attached(hooked)) == set(foldable(module))


@pytest.mark.parametrize("place", ["down_blocks.0", "mid_block", "up_blocks.2"])
def test_folding_where_it_is_not_exact_is_an_error(place: str) -> None:
    module = unconditional("attention")
    with pytest.raises(ValueError, match=f"{place}: a projection there folds into no weight"):
        fold(module.state_dict(), {place: torch.eye(4)})


def test_an_operation_s_projection_acts_before_its_block_s(tmp_path: Path) -> None:
    module, random = unconditional("plain"), torch.Generator().manual_seed(4)
    places = ("up_blocks.0", "up_blocks.0.upsamplers.0.conv")
    matrices = {place: 0.3 * torch.randn(8, 8, generator=random).double() for place in places}
    projection.save(tmp_path, matrices)
    hooked = attach_projection(copy.deepcopy(module), tmp_path)
    folded = fold_into(copy.deepcopy(module), tmp_path)
    assert not attached(folded)
    assert (answer(folded, "plain") - answer(hooked, "plain")).abs().max() < 1e-12


# attaching


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A component folder: stock weights, and the matrices of all blocks."""
    module = unconditional("attention", torch.float32)
    module.save_config(tmp_path / "unet")
    save_state(tmp_path / "unet" / WEIGHTS_NAME, module.state_dict())
    projection.save(tmp_path / "unet", randomised(Projected(module, "block")))
    return tmp_path / "unet"


def test_attached_projections_move_with_the_component_and_stay_out_of_its_state(saved: Path) -> None:
    unet = UNet2DModel.from_pretrained(saved).eval()
    stock, own = set(unet.state_dict()), sum(p.numel() for p in unet.parameters())
    assert attach_projection(unet, str(saved)) is unet
    assert set(unet.state_dict()) == stock
    assert sum(p.numel() for p in unet.parameters()) == own
    assert extra_parameters(unet) == 5 * 64 + 2 * 16
    single = answer(unet, "attention")
    double = answer(unet.double(), "attention")
    assert all(matrix.dtype == torch.float64 for matrix in attached(unet).values())
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_a_copy_has_projections_of_its_own(saved: Path) -> None:
    unet = attach_projection(UNet2DModel.from_pretrained(saved).eval(), saved)
    before = answer(unet, "attention")
    other = copy.deepcopy(unet)
    attach(unet, {})
    assert torch.equal(answer(other, "attention"), before)
    assert not torch.equal(answer(unet, "attention"), before)
    assert torch.equal(answer(unet, "attention"), answer(UNet2DModel.from_pretrained(saved).eval(), "attention"))


def test_attaching_again_from_within_replaces_and_adds_nothing(saved: Path) -> None:
    unet = unconditional("attention", torch.float32)
    once = answer(attach(unet, projection.load(saved)), "attention")
    assert torch.equal(answer(attach(unet, projection.load(saved)), "attention"), once)
    assert len(unet.mid_block._forward_hooks) == 1


def test_the_folder_of_a_pipeline_or_of_a_component_will_do(saved: Path) -> None:
    answers = [answer(attach_projection(unconditional("attention"), folder), "attention") for folder in
               (saved, saved.parent)]  # fmt: skip
    assert torch.equal(*answers)


def test_attaching_twice_is_refused(saved: Path) -> None:
    unet = attach_projection(unconditional("attention"), saved)
    with pytest.raises(UserError, match="attached to this UNet2DModel already; load it anew"):
        attach_projection(unet, saved)


def test_a_folder_without_projections_or_none_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no projection\.safetensors; a model without one is whole as it is"):
        attach_projection(unconditional("plain"), tmp_path)
    with pytest.raises(UserError, match="missing: no such folder"):
        attach_projection(unconditional("plain"), tmp_path / "missing")


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"mid_block": torch.zeros(4, 4)}, r"mid_block is \(4, 4\), but the UNet2DModel has 8 channels there"),
        ({"down_blocks.7": torch.zeros(4, 4)}, r"down_blocks\.7 is no operation or block of the UNet2DModel"),
        ({"mid_blok": torch.zeros(8, 8)}, r"mid_blok is no operation or block of the UNet2DModel"),
        ({"conv_norm_out": torch.zeros(4, 4)}, r"conv_norm_out is no operation or block"),
        ({"conv_inn": torch.zeros(4, 4)}, r"conv_inn is no .*; did you mean 'conv_in'\?"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_leaves_the_model_alone(
    tmp_path: Path, matrices: State, message: str
) -> None:
    projection.save(tmp_path, matrices)
    module = unconditional("plain")
    for put in (attach_projection, fold_into):
        with pytest.raises(UserError, match=message):
            put(module, tmp_path)
    assert not attached(module)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    (saved / FILE).write_bytes((saved / FILE).read_bytes()[:-9])
    with pytest.raises(UserError, match=r"projection\.safetensors: not a whole safetensors file"):
        attach_projection(unconditional("attention"), saved)


def test_pico_models_of_the_tests_have_both_kinds_of_places() -> None:
    folds = foldable(make_pico_denoiser().module)
    assert list(folds.values()) == [False, False, False, True, True]


def test_an_ensemble_of_projected_experts_answers_as_they_do_and_counts_their_matrices(saved: Path) -> None:
    def expert() -> nn.Module:
        return attach_projection(unconditional("attention", torch.float32), saved)

    ensemble = RoutedEnsemble([expert, expert], uniform(2, 20), lambda t: t.long(), resident=1).double()
    alone = answer(expert().double(), "attention")
    assert (answer(ensemble, "attention") - alone).abs().max() < 1e-12
    sizes = [matrix.numel() for matrix in ensemble.buffers() if matrix.is_floating_point()]
    assert sum(sizes) == extra_parameters(expert())
