"""Projections in every latent family: where they stand, that they fold to rounding, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deme_diffusion.errors import UserError
from deme_diffusion.models.placement import foldable, residual_places
from deme_diffusion.models.projection import Projected, attach, fold
from every_family import FAMILIES, TRANSFORMERS, noised_of, opened

every_family = pytest.mark.parametrize("name", FAMILIES)
EXPECTED: dict[str, dict[str, list[str]]] = {
    "dit": {"transformer_blocks.1": ["attn1.to_out.0", "ff.net.2"]},
    "stable_diffusion_3": {
        "transformer_blocks.0": ["attn.to_add_out", "attn.to_out.0", "ff.net.2", "ff_context.net.2"],
        "transformer_blocks.1": ["attn.to_out.0", "ff.net.2"],  # the last one gives no more text
    },
    "flux": {
        "transformer_blocks.0": ["attn.to_add_out", "attn.to_out.0", "ff.net.2", "ff_context.net.2"],
        "single_transformer_blocks.0": ["proj_out"],
    },
    "wan": {"blocks.1": ["attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"]},
    "stable_diffusion": {
        "down_blocks.0.attentions.0": [
            "proj_out",
            "transformer_blocks.0.attn1.to_out.0",
            "transformer_blocks.0.attn2.to_out.0",
            "transformer_blocks.0.ff.net.2",
        ],
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_residual_placement_stands_at_the_ends_of_the_branches_of_every_block(name: str) -> None:
    places = residual_places(opened(name).module)
    assert len(places) == len(set(places))
    for block, inside in EXPECTED[name].items():
        own = [place.removeprefix(f"{block}.") for place in places if place.startswith(f"{block}.")]
        assert sorted(own) == inside
    if name in TRANSFORMERS:  # embeddings and the last layer end no branch
        blocks = ("transformer_blocks.", "single_transformer_blocks.", "blocks.")
        assert all(place.startswith(blocks) for place in places)


def double(denoiser: Any) -> nn.Module:
    """The module in float64, in eval mode."""
    module: nn.Module = denoiser.module.eval()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.double()
    return module


def answer(denoiser: Any, name: str, module: nn.Module) -> torch.Tensor:
    """On held-out images in their middle timesteps, in float64."""
    with torch.no_grad():
        found: torch.Tensor = denoiser.answer(module, noised_of(denoiser, name, [2, 9, 17]))
    return found


def matrices_for(module: nn.Module, placement: str, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """A random D at every place."""
    projected, draw = Projected(opened_copy(module), placement), torch.Generator().manual_seed(1)
    sizes = {place: matrix.shape for place, matrix in projected.projection.state().items()}
    return {place: scale * torch.randn(shape, generator=draw, dtype=torch.float64) for place, shape in sizes.items()}


def opened_copy(module: nn.Module) -> nn.Module:
    """A module of the same architecture, whose hooks are its own."""
    kind: Any = type(module)
    made: nn.Module = kind.from_config(module.config)
    return made


@every_family
def test_every_projection_of_the_residual_placement_folds_to_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # some blocks turn to float32 on their way
    denoiser = opened(name)
    module = double(denoiser)
    base, matrices = answer(denoiser, name, module), matrices_for(module, "residual")
    assert all(foldable(module, "residual").values())
    stock = {key: value.clone() for key, value in module.state_dict().items()}
    attached = answer(denoiser, name, attach(module, matrices))
    attach(module, {}).load_state_dict(fold(stock, matrices))
    folded = answer(denoiser, name, module)
    assert float((attached - base).norm() / base.norm()) > 1e-2
    assert float((folded - attached).norm() / attached.norm()) < 1e-12


@pytest.mark.parametrize("name", ["stable_diffusion", *TRANSFORMERS])
def test_each_place_has_an_effect_of_its_own(name: str) -> None:
    denoiser = opened(name)
    module = denoiser.module
    base, matrices = answer(denoiser, name, module), matrices_for(module, "residual")
    for place, matrix in matrices.items():
        changed = answer(denoiser, name, attach(module, {place: matrix}))
        assert float((changed - base).abs().max()) > 0, place


@every_family
def test_projections_at_0_change_no_bit(name: str) -> None:
    denoiser = opened(name)
    before = answer(denoiser, name, denoiser.module)
    projected = Projected(denoiser.module, "residual").eval()
    assert torch.equal(answer(denoiser, name, projected), before)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_and_spatial_projections_are_refused_for_transformers(name: str) -> None:
    module = opened(name).module
    kind = type(module).__name__
    with pytest.raises(UserError, match=f"block is of U-Nets, and a {kind} is none; use residual or none$"):
        Projected(module, "block")
    with pytest.raises(UserError, match=f"projection_axes: both: no convolution .* in a {kind}; use channel$"):
        Projected(module, "residual", "both")


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_the_papers_placement_follows_the_blocks_of_a_conditional_unet(name: str) -> None:
    denoiser = opened(name)
    module = double(denoiser)
    folds = foldable(module)
    assert folds == {"down_blocks.0": False, "down_blocks.1": False, "mid_block": False, "up_blocks.0": True,
                     "up_blocks.1": False}  # fmt: skip
    base, matrices = answer(denoiser, name, module), matrices_for(module, "block")
    assert float((answer(denoiser, name, attach(module, matrices)) - base).norm() / base.norm()) > 1e-2
    kept = {place: matrix for place, matrix in matrices.items() if not folds[place]}
    hooked = answer(denoiser, name, attach(module, matrices))
    attach(module, kept).load_state_dict(fold(module.state_dict(), {"up_blocks.0": matrices["up_blocks.0"]}))
    assert float((answer(denoiser, name, module) - hooked).norm() / hooked.norm()) < 1e-12
