"""Families on a discrete schedule: what is trained on is what stock schedulers and encoders of diffusers make."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from deme_diffusion.errors import UserError
from deme_diffusion.models.families import family
from families import (
    LONG,
    MADE,
    TEXT,
    T,
    batch,
    copied,
    made_pipelines,  # noqa: F401  (a fixture)
    noised,
    opened,
    rewritten,
    stock,
)

# --- the forward process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_one_training_step_by_the_schedulers_algebra(pipelines: dict[str, Path], name: str) -> None:
    denoiser = opened(pipelines, name)
    found = noised(denoiser, [0, 7, 19])
    betas = np.linspace(1e-4, 0.3, T)  # all three are saved with diffusers' linear schedule
    abar = torch.tensor(np.cumprod(1 - betas)[[0, 7, 19]]).view(-1, 1, 1, 1)
    vae = diffusers.AutoencoderKL.from_pretrained(pipelines[name] / "vae")
    with torch.no_grad():
        clean = vae.encode(batch(denoiser)["image"]).latent_dist.mean * vae.config.scaling_factor
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * clean
    expected = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    torch.testing.assert_close(found.x_t.double(), expected, rtol=1e-4, atol=1e-5)
    expected = velocity if name == "sd_v" else noise.double()
    torch.testing.assert_close(found.target.double(), expected, rtol=1e-4, atol=1e-5)
    answer = denoiser.predict(denoiser.module, found.x_t, found.t, found.condition)
    assert answer.shape == found.target.shape == (3, *denoiser.sample_shape)
    assert found.x_t.std() > 0 and answer.std() > 0


def test_what_dit_learns_of_the_variance_is_no_part_of_the_prediction(pipelines: dict[str, Path]) -> None:
    denoiser = opened(pipelines, "dit")
    given = noised(denoiser, [3, 3, 3])
    whole = denoiser.module(given.x_t, given.t, class_labels=given.condition["class_labels"]).sample
    assert whole.shape == (3, 8, 4, 4)
    assert torch.equal(denoiser.predict(denoiser.module, given.x_t, given.t, given.condition), whole[:, :4])


def test_dit_drops_no_class_by_itself(pipelines: dict[str, Path]) -> None:
    denoiser = opened(pipelines, "dit")
    given = noised(denoiser, [3, 3, 3])
    before = torch.get_rng_state()
    for module in (denoiser.module, denoiser.component_from(pipelines["dit"]), denoiser.student()):
        modes = [denoiser.predict(module.train(mode), given.x_t, given.t, given.condition) for mode in (True, False)]
        assert torch.equal(*modes)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", MADE)
def test_what_is_encoded_beforehand_is_taken_as_it_is(pipelines: dict[str, Path], name: str) -> None:
    denoiser, fresh = opened(pipelines, name), opened(pipelines, name)
    now = noised(denoiser, [0, 7, 19])
    encoded = {key: value for key, value in denoiser.encoded(batch(denoiser)).items() if key != "image"}
    noise = torch.randn(3, *denoiser.sample_shape, generator=torch.Generator().manual_seed(1))
    then = fresh.noised(encoded, torch.tensor([0, 7, 19]), noise)
    assert torch.equal(now.x_t, then.x_t) and torch.equal(now.target, then.target)
    assert "pipeline" not in vars(fresh), "neither autoencoder nor text encoders are loaded"
    shapes = {key: (value.shape, value.dtype) for key, value in then.condition.items()}
    assert {key: (value.shape, value.dtype) for key, value in fresh.placeholder(3).items()} == shapes


def test_autoencoders_that_give_no_posterior_or_state_a_mean(pipelines: dict[str, Path]) -> None:
    images = batch(denoiser := opened(pipelines, "sdxl"))["image"]
    options = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4), "latent_channels": 4}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    small = AutoencoderTiny(in_channels=1, out_channels=1, scaling_factor=0.5, **options, **blocks)
    expected = small.encode(images).latents * 0.5
    vae = denoiser.pipeline.vae
    plain = denoiser.encode_images(images) / vae.config.scaling_factor
    denoiser.pipeline.vae = small
    assert torch.equal(denoiser.encode_images(images), expected)
    denoiser.pipeline.vae = vae
    mean, std = torch.arange(4.0), torch.arange(1.0, 5.0)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    undone = denoiser.encode_images(images) * std.view(1, 4, 1, 1) / vae.config.scaling_factor + mean.view(1, 4, 1, 1)
    torch.testing.assert_close(undone, plain, rtol=1e-5, atol=1e-5)


# --- conditions -----------------------------------------------------------------------------------------------------


def test_captions_are_encoded_as_the_stock_pipeline_encodes_them(pipelines: dict[str, Path]) -> None:
    for name in ("sd", "sd_v"):
        found = opened(pipelines, name).encode_captions(["a dog", "", LONG])
        pipeline = stock(pipelines[name], "StableDiffusionPipeline")
        asked, none = pipeline.encode_prompt(["a dog", "2 cats", LONG], "cpu", 1, True)
        assert torch.equal(found["encoder_hidden_states"], torch.stack([asked[0], none[1], asked[2]]))


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_gives_both_encoders_the_pooled_embedding_and_the_sizes(
    pipelines: dict[str, Path], tmp_path: Path, zeros: bool
) -> None:
    folder = copied(pipelines, "sdxl", tmp_path)
    rewritten(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    found = family("stable_diffusion_xl").load(folder).encode_captions(["a dog", "", LONG])  # type: ignore[attr-defined]
    pipeline = stock(folder, "StableDiffusionXLPipeline", add_watermarker=False)
    asked, none, pooled, none_pooled = pipeline.encode_prompt(["a dog", "2 cats", LONG], device="cpu")
    assert torch.equal(found["encoder_hidden_states"], torch.stack([asked[0], none[1], asked[2]]))
    assert torch.equal(found["text_embeds"], torch.stack([pooled[0], none_pooled[1], pooled[2]]))
    assert bool((none == 0).all()) is zeros
    sizes = pipeline._get_add_time_ids((8, 8), (0, 0), (8, 8), torch.float32, 12)
    assert torch.equal(found["time_ids"], sizes.repeat(3, 1))


def test_dit_takes_labels_of_which_minus_one_is_the_null_class(pipelines: dict[str, Path]) -> None:
    denoiser = opened(pipelines, "dit")
    found = denoiser.encode_prompts({"label": torch.tensor([0, -1, 999])})
    assert found["class_labels"].tolist() == [0, 1000, 999]
    for label, said in ((1000, "label 1000: .* knows classes 0 to 999"), (-2, "label -2: ")):
        with pytest.raises(UserError, match=said):
            denoiser.encode_labels(torch.tensor([1, label]))


@pytest.mark.parametrize("name", TEXT)
def test_overlong_captions_are_told(pipelines: dict[str, Path], name: str) -> None:
    fits = "abcdefghij"  # with its two marks as many tokens as there are places
    assert opened(pipelines, name).truncated(["", fits, fits + "k", LONG]) == [False, False, True, True]
    assert opened(pipelines, name).truncated([]) == []
