"""Figures and searches' derivatives of every latent family: blocks, landscapes, similarity, Fisher, equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deme_diffusion.analysis.activations import measure, places, watched, write_activations
from deme_diffusion.analysis.landscape import write_landscape
from deme_diffusion.analysis.plane import write_plane
from deme_diffusion.analysis.similarity import write_similarity
from deme_diffusion.analysis.vectors import forward_order
from deme_diffusion.config import AnalyzeSettings, LossSettings, SimilaritySettings
from deme_diffusion.evaluation.fisher import points, squared_gradients
from deme_diffusion.evaluation.objectives import FixedNoiseObjective
from deme_diffusion.figure_file import read_figure
from deme_diffusion.models.objective import FixedNoise, denoising_loss
from deme_diffusion.models.precision import in_float32
from every_family import FAMILIES, SUBSET, T, noised_of, opened, split_of

every_family = pytest.mark.parametrize("name", FAMILIES)
a_few = pytest.mark.parametrize("name", ["stable_diffusion", "dit", "flux"])
RANGES = [[[0, 12]], [[12, T]]]
PLACES = {
    "stable_diffusion": ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"],
    "stable_diffusion_xl": ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"],
    "dit": ["transformer_blocks.0", "transformer_blocks.1"],
    "stable_diffusion_3": ["transformer_blocks.0", "transformer_blocks.1"],
    "flux": ["transformer_blocks.0", "single_transformer_blocks.0"],
    "wan": ["blocks.0", "blocks.1"],
}
TOKENS = {"dit": (8, 4), "stable_diffusion_3": (16, 4), "flux": (16, 4), "wan": (24, 1)}
"""(channels, tokens of the image): of SD3 and Flux the text's are not among them."""


def moved(denoiser: Any, seed: int, scale: float = 0.02) -> nn.Module:
    """Another model: the base's weights, each a little off."""
    module, draw = denoiser.student().eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=draw)
    found: nn.Module = module.to(denoiser.module.dtype)
    return found


def noise_of(denoiser: Any, name: str, images: int = 4) -> FixedNoise:
    """A few points in each of two ranges."""
    return FixedNoise(denoiser, split_of(name, "search", images), RANGES, LossSettings(draws=1), 3)


# --- activations --------------------------------------------------------------------------------------------------


@every_family
def test_the_places_are_the_blocks_and_what_they_hand_on_of_the_image(name: str) -> None:
    denoiser = opened(name)
    module, where = denoiser.module, places(denoiser.module)
    assert where == PLACES[name]
    (same, other) = measure(noise_of(denoiser, name), RANGES[0], module, [module, moved(denoiser, 0)], where)
    assert all(not one.change.any() and one.base.mean() > 0 for one in same)
    assert all(one.change.min() > 0 for one in other)
    if name in TOKENS:
        assert {one.base.shape[1:] for one in same} == {TOKENS[name]}
    else:
        assert [one.shape for one in same] == [(2, 2), (2, 2), (2, 2), (4, 4), (4, 4)]


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_the_image_states_of_a_block_are_those_that_the_next_one_gets(name: str) -> None:
    denoiser = opened(name)
    seen: dict[str, torch.Tensor] = {}

    def hook(part: nn.Module, inputs: Any, given: Mapping[str, Any], output: Any) -> None:
        seen["image"], seen["text"] = given["hidden_states"], given["encoder_hidden_states"]

    denoiser.module.get_submodule(PLACES[name][1]).register_forward_hook(hook, with_kwargs=True)
    found: list[torch.Tensor] = []
    with watched(denoiser.module, PLACES[name][:1], lambda k, output: found.append(output)), torch.no_grad():
        denoiser.answer(denoiser.module, noised_of(denoiser, name, [3, 4]))
    assert torch.equal(found[0].transpose(1, 2), seen["image"])
    assert found[0].shape[2] != seen["text"].shape[1]


@every_family
def test_in_bfloat16_a_change_by_rounding_has_no_variation(name: str, tmp_path: Path) -> None:
    denoiser = opened(name, torch.bfloat16)
    settings, noise = AnalyzeSettings(num_images=4, draws=1), noise_of(denoiser, name)
    experts: list[Callable[[], nn.Module]] = [lambda: moved(denoiser, 0), lambda: moved(denoiser, 0, scale=0.0)]
    options = {"served": RANGES, "names": ["one", "none"]}
    write_activations(tmp_path / "a.npz", noise, denoiser.module, experts, None, settings, **options)
    data = read_figure(tmp_path / "a.npz")
    assert np.isfinite(data.arrays["sizes"]).all()
    assert np.isfinite(data.arrays["variations"][0, :, 0, 0]).any()
    assert np.isnan(data.arrays["variations"][1, :, [0, 2]]).all()


# --- losses around the base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in FAMILIES), ("dit", torch.bfloat16), ("wan", torch.bfloat16)],
)
def test_landscape_and_plane_hold_the_losses_of_the_models_that_they_show(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    denoiser = opened(name, dtype)
    settings = AnalyzeSettings(num_images=4, draws=1, landscape_points=3, plane_points=3)
    noise, base = noise_of(denoiser, name), denoiser.module
    experts = [lambda seed=seed: moved(denoiser, seed) for seed in (1, 2)]
    options: dict[str, Any] = {"names": ["one", "two"]}
    write_landscape(tmp_path / "l.npz", noise, base, experts, settings, **options, partial=tmp_path / "l")
    write_plane(
        tmp_path / "p.npz", noise, base, experts, None, settings, pair=(0, 1), **options, partial=tmp_path / "p"
    )
    landscape = read_figure(tmp_path / "l.npz")
    marks = read_figure(tmp_path / "p.npz").meta["marks"]
    own = noise.losses(in_float32(base))  # or the steps of a landscape were lost to rounding
    np.testing.assert_allclose(landscape.arrays["loss"][:, 1, 1], own, rtol=1e-6)
    assert landscape.arrays["overall"][1, 1] == pytest.approx(noise.overall(own), rel=1e-6)
    assert marks[0]["losses"][1:] == pytest.approx(own, rel=1e-6)
    assert marks[1]["losses"][1:] == pytest.approx(noise.losses(in_float32(moved(denoiser, 1))), rel=1e-6)
    assert np.ptp(landscape.arrays["overall"]) > 0


@a_few
def test_similarity_compares_the_gradients_of_a_conditional_model(name: str, tmp_path: Path) -> None:
    denoiser = opened(name)
    settings, split = SimilaritySettings(bins=2, num_images=3, sketch=64), split_of(name)
    plain = write_similarity(tmp_path / "one.npz", denoiser, split, settings, batch_size=4)
    write_similarity(tmp_path / "two.npz", denoiser, split, settings, batch_size=4, checkpointing=True)
    one, two = (read_figure(tmp_path / f"{which}.npz").arrays for which in ("one", "two"))
    np.testing.assert_allclose(np.diagonal(one["cosine"]), 1, atol=1e-5)
    np.testing.assert_allclose(one["cosine"], two["cosine"], atol=1e-4)
    assert plain["num_images"] == 3 and (one["norms"] > 0).all()


# --- the searches -------------------------------------------------------------------------------------------------


@every_family
def test_fisher_is_the_sum_of_squared_gradients_sample_by_sample(name: str) -> None:
    denoiser = opened(name)
    module = denoiser.student().eval()
    noised = points(denoiser, split_of(name), SUBSET, 0, 0, 3, torch.device("cpu"))
    found = {key: value.clone() for key, value in squared_gradients(denoiser, module, noised)}
    expected = {key: torch.zeros_like(value) for key, value in found.items()}
    for i in range(3):
        condition = {key: value[i : i + 1] for key, value in noised.condition.items()}
        answer = denoiser.predict(module, noised.x_t[i : i + 1], noised.t[i : i + 1], condition)
        loss = 0.5 * (noised.target[i : i + 1] - answer).square().sum()
        names, parameters = zip(*module.named_parameters(), strict=True)
        for key, value in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            expected[key] += 0 if value is None else value.square()
    largest = max(float(value.max()) for value in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6 * largest)


@every_family
def test_the_normal_equations_are_those_of_the_experts_changes(name: str) -> None:
    denoiser = opened(name)
    noise, base = noise_of(denoiser, name), denoiser.module
    experts = [moved(denoiser, seed) for seed in (1, 2)]
    objective = FixedNoiseObjective(noise, base, [lambda one=one: one for one in experts], lambda weights: base)
    a, b = objective.normal_equations()
    expected_a, expected_b = np.zeros((2, 2)), np.zeros(2)
    masses = [denoiser.mass(np.arange(*runs[0])) for runs in RANGES]
    for runs, mass in zip(RANGES, masses, strict=True):
        for noised in noise.batches(runs, torch.device("cpu")):
            with torch.no_grad():
                own = denoiser.answer(base, noised)
                changes = torch.stack([(denoiser.answer(one, noised) - own).flatten() for one in experts]).double()
            expected_a += mass / 4 * (changes @ changes.T).numpy()
            expected_b += mass / 4 * (changes @ (noised.target - own).flatten().double()).numpy()
    np.testing.assert_allclose(a, expected_a, rtol=1e-4)
    np.testing.assert_allclose(b, expected_b, rtol=1e-4)
    half = opened(name, torch.bfloat16)
    rough = FixedNoiseObjective(
        noise_of(half, name), half.module, [lambda one=one: one for one in experts], lambda weights: half.module
    ).normal_equations()[0]
    np.testing.assert_allclose(rough, a, rtol=0.5)


@a_few
def test_the_gradient_in_weights_is_the_finite_difference(name: str) -> None:
    """Of the loss of base + w tau."""
    denoiser = opened(name)
    noise, base, expert = noise_of(denoiser, name), denoiser.module, moved(denoiser, 1)
    tau = {
        key: value - base.state_dict()[key] for key, value in expert.state_dict().items() if value.is_floating_point()
    }

    class Along:
        def prepare(self, weights: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
            module = opened(name).module
            with torch.no_grad():
                for key, parameter in module.named_parameters():
                    parameter += weights[0] * tau[key]
            return module, {key: p.requires_grad_(True) for key, p in module.named_parameters()}

        def pull_back(self, weights: Any, gradients: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, ...]]:
            return {"": (sum(float((tau[key] * value).sum()) for key, value in gradients.items()),)}

    along = Along()
    objective = FixedNoiseObjective(noise, base, [lambda: expert], lambda w: along.prepare(w)[0], derivative=along)
    loss, gradient = objective.gradient([0.3])
    around = [objective.value([0.3 + step]) for step in (-0.05, 0.05)]
    assert loss == pytest.approx(objective.value([0.3]), rel=1e-5)
    assert gradient[""][0] == pytest.approx((around[1] - around[0]) / 0.1, rel=0.1)


# --- task vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("dit", ["pos_embed.proj", "transformer_blocks.0", "transformer_blocks.1", "proj_out_1", "proj_out_2"]),
        ("stable_diffusion_3", ["pos_embed.proj", "time_text_embed", "context_embedder", "transformer_blocks.0",
                                "transformer_blocks.1", "norm_out", "proj_out"]),
        ("flux", ["x_embedder", "time_text_embed", "context_embedder", "transformer_blocks.0",
                  "single_transformer_blocks.0", "norm_out", "proj_out"]),
        ("wan", ["patch_embedding", "condition_embedder", "blocks.0", "blocks.1", "scale_shift_table", "proj_out"]),
        ("flux", ["transformer_blocks.0.norm1.", "transformer_blocks.0.norm1_context", "transformer_blocks.0.attn.to_q",
                  "transformer_blocks.0.attn.norm_q", "transformer_blocks.0.attn.add_q_proj",
                  "transformer_blocks.0.attn.to_out", "transformer_blocks.0.attn.to_add_out",
                  "transformer_blocks.0.ff.", "transformer_blocks.0.ff_context"]),
    ],
)  # fmt: skip
def test_layers_stand_in_the_order_of_the_forward(name: str, order: list[str]) -> None:
    keys = sorted(opened(name).module.state_dict(), key=forward_order)
    firsts = [next(i for i, key in enumerate(keys) if key.startswith(part)) for part in order]
    assert firsts == sorted(firsts)


def test_denoising_losses_of_latents_with_frames_are_means_over_all_their_entries() -> None:
    one, other = torch.zeros(2, 4, 3, 2, 2), torch.ones(2, 4, 3, 2, 2, dtype=torch.bfloat16)
    assert denoising_loss(one, 3 * other).tolist() == [9.0, 9.0]
