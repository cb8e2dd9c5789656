"""The public code's checkpoints: names and adapters there and back, and the same function of x_t and t."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from deme_diffusion import attach_projection
from deme_diffusion.errors import UserError
from deme_diffusion.merging.apply import Merger
from deme_diffusion.models import projection
from deme_diffusion.models.conversion import convert, write_public
from deme_diffusion.models.placement import block_places, shapes_of
from deme_diffusion.models.projection import FILE, attached, fold_into
from deme_diffusion.models.public import (
    PUBLIC_WIDTHS,
    adapted_blocks,
    adapter_widths,
    old_name,
    public_state,
    read_public,
)
from deme_diffusion.weights import WEIGHTS_NAME, State, modern_name, save_state

BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
WIDTHS = (4, 8, 8, 8, 4)
EPSILON = 2**-24
"""Half the distance of float32 numbers in [1, 2)."""


def unet(seed: int = 0, **options: Any) -> UNet2DModel:
    torch.manual_seed(seed)
    widths: dict[str, Any] = {"block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 4}
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    plain: dict[str, Any] = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1}
    return UNet2DModel(**{**plain, **widths, **blocks, **options}).eval()


def config_of(module: UNet2DModel) -> dict[str, Any]:
    """As it stands in config.json."""
    return {"_class_name": "UNet2DModel", **module.config}


def adapters(seed: int, widths: tuple[int, ...] = WIDTHS) -> list[torch.Tensor]:
    """P of every block, as training leaves it: near the identity."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.eye(c)[:, :, None, None] + 0.1 * torch.randn(c, c, 1, 1, generator=generator) for c in widths]


def public(module: UNet2DModel, matrices: list[torch.Tensor]) -> State:
    """The state dict that the public code saves of this model with these adapters."""
    state = {old_name(key): tensor.clone() for key, tensor in module.state_dict().items()}
    return state | {f"adapter_list.{i}.weight": matrix for i, matrix in enumerate(matrices)}


def public_forward(module: UNet2DModel, matrices: list[torch.Tensor], x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The model as the public code runs it: a convolution after every block, skip connections before it."""
    following = iter(matrices)
    embedded = module.time_embedding(module.time_proj(t).to(x.dtype))
    hidden = module.conv_in(x)
    skips = [hidden]
    for block in module.down_blocks:
        hidden, given = block(hidden, embedded)
        hidden = F.conv2d(hidden, next(following))
        skips += given
    hidden = F.conv2d(module.mid_block(hidden, embedded), next(following))
    for block in module.up_blocks:
        count = len(block.resnets)
        hidden = F.conv2d(block(hidden, tuple(skips[-count:]), embedded), next(following))
        skips = skips[:-count]
    assert not skips and next(following, None) is None
    return module.conv_out(module.conv_act(module.conv_norm_out(hidden)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder; read only."""
    folder = tmp_path_factory.mktemp("base")
    DDPMPipeline(unet=unet(), scheduler=DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    return folder


def saved(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


def expert(number: int) -> UNet2DModel:
    return unet(seed=number)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9), dtype=dtype), torch.tensor([3, 17])


# -- names -----------------------------------------------------------------------------------------


def test_names_of_attention_go_there_and_back() -> None:
    state = unet().state_dict()
    old = {old_name(key) for key in state}
    assert len(old - state.keys()) == 4 * 8, "four attentions of four layers, each with weight and bias"
    assert "mid_block.attentions.0.proj_attn.bias" in old and "mid_block.attentions.0.query.weight" in old
    assert {modern_name(key) for key in old} == state.keys()


def test_adapted_blocks_are_those_of_the_forward_in_its_order() -> None:
    module = unet()
    assert adapted_blocks(shapes_of(module), module.config) == BLOCKS == block_places(module)
    many = unet(
        block_out_channels=(4,) * 11, down_block_types=("DownBlock2D",) * 11, up_block_types=("UpBlock2D",) * 11,
        sample_size=1024,
    )  # fmt: skip
    places = adapted_blocks(shapes_of(many), many.config)
    assert places[9:13] == ["down_blocks.9", "down_blocks.10", "mid_block", "up_blocks.0"] and len(places) == 23


def test_blocks_with_skip_conv_are_passed_over() -> None:
    module = unet(down_block_types=("SkipDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "SkipUpBlock2D"))
    assert adapted_blocks(shapes_of(module), module.config) == ["down_blocks.1", "mid_block", "up_blocks.0"]
    # The last of them has a skip_conv of None, which leaves no key: its kind tells.
    last = unet(down_block_types=("DownBlock2D", "SkipDownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
    assert "down_blocks.1" not in adapted_blocks(shapes_of(last), last.config)


def test_the_public_codes_own_widths_are_those_of_church() -> None:
    with torch.device("meta"):
        church = unet(
            sample_size=256,
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            norm_num_groups=32,
            attention_head_dim=None,
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        )
        state = public_state(dict(church.state_dict()), {}, config_of(church), where=Path("church"))
    assert adapter_widths(state) == PUBLIC_WIDTHS


# -- the function ----------------------------------------------------------------------------------


def test_converted_model_predicts_as_the_public_code_does(base: Path, tmp_path: Path) -> None:
    matrices = adapters(1)
    convert(saved(public(expert(1), matrices), tmp_path / "expert.bin"), tmp_path / "expert", base)
    x, t = inputs(torch.float64)
    wide = [matrix.double() for matrix in matrices]
    with torch.no_grad():
        reference = public_forward(expert(1).double(), wide, x, t)
        loaded = UNet2DModel.from_pretrained(tmp_path / "expert").double()
        stock = loaded(x, t).sample
        answers = [
            attach_projection(copy.deepcopy(loaded), tmp_path / "expert")(x, t).sample,
            fold_into(copy.deepcopy(loaded), tmp_path / "expert")(x, t).sample,
        ]
    assert not torch.allclose(stock, reference, rtol=1e-2), "the adapters do something"
    for answer in answers:  # D = P - 1 was rounded to float32, where P's diagonal lies outside [0.5, 2]
        torch.testing.assert_close(answer, reference, rtol=1e-6, atol=1e-7)


def test_stock_diffusers_loads_what_has_identities_only(base: Path, tmp_path: Path) -> None:
    identities = [torch.eye(c)[:, :, None, None] for c in WIDTHS]
    done = convert(saved(public(expert(1), identities), tmp_path / "expert.bin"), tmp_path / "expert", base)
    assert not (tmp_path / "expert" / FILE).exists() and done.projections == []
    loaded, told = UNet2DModel.from_pretrained(tmp_path / "expert", output_loading_info=True)
    assert not any(told.values()), told
    x, t = inputs(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t).sample, public_forward(expert(1), identities, x, t))


def test_merging_converted_experts_is_equation_8_on_weights_and_adapters(base: Path, tmp_path: Path) -> None:
    w, start, trained = (0.1, 0.1, 0.2, 0.5), unet(), [expert(i + 1).double().state_dict() for i in range(4)]
    for i in range(4):
        convert(saved(public(expert(i + 1), adapters(i)), tmp_path / f"{i}.bin"), tmp_path / f"expert{i}", base)
    shell = unet(seed=7)
    with Merger(base / "unet", [tmp_path / f"expert{i}" for i in range(4)]) as merger:
        merger.into(shell, w)
    # theta = theta_0 + sum_i w_i (theta_i - theta_0), the adapters' theta_0 being the identity.
    by_hand = {
        key: value.double() + sum(w[i] * (trained[i][key] - value.double()) for i in range(4))
        for key, value in start.state_dict().items()
    }
    matrices = [
        torch.eye(c).double()[:, :, None, None]
        + sum(w[i] * (adapters(i)[index].double() - torch.eye(c).double()[:, :, None, None]) for i in range(4))
        for index, c in enumerate(WIDTHS)
    ]
    reference = unet().double()
    reference.load_state_dict(by_hand)
    x, t = inputs(torch.float64)
    with torch.no_grad():
        expected = public_forward(reference, matrices, x, t)
        torch.testing.assert_close(shell(x.float(), t).sample.double(), expected, rtol=1e-4, atol=1e-5)
    kept = attached(shell)
    assert "mid_block" in kept and "up_blocks.1" not in kept, "the last up block folds, the mid block does not"
    for index, block in enumerate(BLOCKS):
        if block in kept:
            c = WIDTHS[index]
            torch.testing.assert_close(
                kept[block].double(), matrices[index][:, :, 0, 0] - torch.eye(c), rtol=1e-5, atol=1e-6
            )


# -- there and back --------------------------------------------------------------------------------


def test_public_file_comes_back_to_the_bit(base: Path, tmp_path: Path) -> None:
    state = public(expert(1), adapters(1))
    diagonal = torch.cat([matrix[:, :, 0, 0].diagonal() for k, matrix in state.items() if k.startswith("adapter_list")])
    assert ((diagonal > 0.5) & (diagonal < 2)).all(), "where P - 1 is exact"
    convert(saved(state, tmp_path / "expert.bin"), tmp_path / "expert", base)
    write_public(tmp_path / "expert", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key].view(torch.int32), state[key].view(torch.int32)) for key in state)


def test_what_rounding_leaves(base: Path, tmp_path: Path) -> None:
    """P far from I: the diagonal moves by half a unit of P - 1; D -> P -> D: by half a unit of 1 + D."""
    far = [8 * matrix for matrix in adapters(1)]
    convert(saved(public(expert(1), far), tmp_path / "far.bin"), tmp_path / "far", base)
    write_public(tmp_path / "far", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    for i, matrix in enumerate(far):
        returned = back[f"adapter_list.{i}.weight"]
        off = ~torch.eye(WIDTHS[i], dtype=torch.bool)
        assert torch.equal(returned[off], matrix[off])
        assert ((returned - matrix).abs() <= matrix.abs() * 4 * EPSILON).all()

    small = {block: 1e-3 * torch.randn(c, c) for block, c in zip(BLOCKS, WIDTHS, strict=True)}
    module = unet()
    there = public_state(dict(module.state_dict()), small, config_of(module), where=tmp_path)
    _, again = read_public(there, shapes_of(module), module.config, file=tmp_path, like="itself")
    differences = torch.cat([(again[block] - small[block]).flatten() for block in BLOCKS])
    assert 0 < differences.abs().max() <= EPSILON


def test_a_merged_pipeline_and_a_stock_one_can_be_written_back(base: Path, tmp_path: Path) -> None:
    done = write_public(base, tmp_path / "stock.bin")
    state = torch.load(tmp_path / "stock.bin", weights_only=True)
    assert all(torch.equal(state[f"adapter_list.{i}.weight"][:, :, 0, 0], torch.eye(c)) for i, c in enumerate(WIDTHS))
    assert "[4, 8, 8, 8, 4]" in done.notes[0], "the public code has its widths written in"
    x, t = inputs(torch.float32)
    loaded = unet(seed=5)
    weights, matrices = read_public(state, shapes_of(loaded), loaded.config, file=tmp_path, like="itself")
    loaded.load_state_dict(weights)
    with torch.no_grad():
        assert not matrices and torch.equal(loaded(x, t).sample, unet()(x, t).sample)


def test_half_precision_stays_half(base: Path, tmp_path: Path) -> None:
    state = {key: tensor.half() for key, tensor in public(expert(1), adapters(1)).items()}
    convert(saved(state, tmp_path / "half.bin"), tmp_path / "half", base)
    write_public(tmp_path / "half", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert all(back[key].dtype == torch.float16 and torch.equal(back[key], state[key]) for key in state)


# -- what does not fit -----------------------------------------------------------------------------


def refusal(state: State, folder: Path, base: Path) -> str:
    with pytest.raises(UserError) as refused:
        convert(saved(state, folder / "expert.bin"), folder / "out", base)
    assert [path.name for path in folder.iterdir()] == ["expert.bin"], "nothing is left"
    return str(refused.value)


def test_adapters_that_do_not_fit_are_named(base: Path, tmp_path: Path) -> None:
    state = public(expert(1), adapters(1))
    line = refusal({**state, "adapter_list.5.weight": torch.eye(4)[:, :, None, None]}, tmp_path, base)
    assert "adapter_list.5, (4, 4, 1, 1), follows no block" in line and "has 5 blocks" in line
    line = refusal({key: value for key, value in state.items() if key != "adapter_list.3.weight"}, tmp_path, base)
    assert "adapter_list.3 is missing (4 of 5 there)" in line and "up_blocks.0" in line and "(8, 8, 1, 1)" in line
    line = refusal({**state, "adapter_list.1.weight": torch.eye(6)[:, :, None, None]}, tmp_path, base)
    assert "adapter_list.1 has shape (6, 6, 1, 1), but down_blocks.1" in line and "expects (8, 8, 1, 1)" in line
    line = refusal({**state, "adapter_list.1.weight": torch.zeros(8, 8, 3, 3)}, tmp_path, base)
    assert "(8, 8, 3, 3)" in line
    line = refusal({**state, "adapter_list.1.bias": torch.zeros(8)}, tmp_path, base)
    assert "adapter_list.1.bias is unknown" in line


def test_missing_and_extra_keys_are_listed_with_the_nearest_name(base: Path, tmp_path: Path) -> None:
    state = public(expert(1), adapters(1))
    state["conv_inn.weight"] = state.pop("conv_in.weight")
    line = refusal(state, tmp_path, base)
    assert "1 missing (conv_in.weight)" in line and "1 extra (conv_inn.weight)" in line
    assert "did you mean 'conv_in.weight'?" in line
    wider = public(unet(block_out_channels=(8, 16)), adapters(1, (8, 16, 16, 16, 8)))
    line = refusal(wider, tmp_path, base)
    assert "has shape" in line and "tensors differ" in line and str(base / "unet") in line
    state = public(expert(1), [])
    line = refusal({**state, "mid_block.attentions.0.to_q.weight": torch.zeros(8, 8)}, tmp_path, base)
    assert "mid_block.attentions.0.to_q.weight is there twice" in line


def test_other_placements_and_models_are_not_written_for_the_public_code(base: Path, tmp_path: Path) -> None:
    module = unet()
    module.save_pretrained(tmp_path / "expert")
    place = "mid_block.resnets.0.conv2"
    save_state(tmp_path / "expert" / FILE, {place: torch.ones(8, 8)})
    with pytest.raises(UserError, match=rf"after {place} \(1 such\).*projection=block"):
        write_public(tmp_path / "expert", tmp_path / "back.bin")
    projection.save(tmp_path / "expert", {place: torch.zeros(8, 8)})
    write_public(tmp_path / "expert", tmp_path / "zero.bin")  # a D of 0 is no projection
    projection.save(tmp_path / "expert", {"mid_block": torch.ones(4, 4)})
    with pytest.raises(UserError, match=r"mid_block is .* has 8 channels there"):
        write_public(tmp_path / "expert", tmp_path / "back.bin")
    weights = dict(module.state_dict())
    for change in ({"_class_name": "UNet2DConditionModel"}, {"mid_block_type": None}, {"downsample_type": "resnet"}):
        config = {**config_of(module), **change}
        with pytest.raises(UserError, match=str(next(iter(change.values()))) + r".*the public code"):
            public_state(weights, {}, config, where=tmp_path)
    skips = unet(down_block_types=("SkipDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "SkipUpBlock2D"))
    with pytest.raises(UserError, match=r"after down_blocks\.0 "):
        public_state(dict(skips.state_dict()), {"down_blocks.0": torch.ones(4, 4)}, config_of(skips), where=tmp_path)
    assert not (tmp_path / "back.bin").exists() and (tmp_path / "expert" / WEIGHTS_NAME).is_file()
