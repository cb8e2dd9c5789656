"""Families on a discrete schedule: what is sampled, by one model or an ensemble, is what stock pipelines sample."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

import tiny
from deme_diffusion.divisions import uniform
from deme_diffusion.errors import UserError
from deme_diffusion.models.ensemble import RoutedEnsemble
from deme_diffusion.models.families import family
from families import (
    EXTRA,
    KINDS,
    MADE,
    T,
    copied,
    generated,
    made_pipelines,  # noqa: F401  (a fixture)
    noised,
    opened,
    prompts,
    rewritten,
    stock,
)

# --- sampling -------------------------------------------------------------------------------------------------------

CASES = [
    ("sd", DDIMScheduler, None, {"eta": 0.0}),
    ("sd", DDPMScheduler, 1.0, {}),
    ("sd", DDIMScheduler, 3.0, {"eta": 1.0}),
    ("sd_v", DDIMScheduler, 2.0, {}),
    ("sdxl", EulerDiscreteScheduler, None, {}),
    ("sdxl", DDPMScheduler, 1.0, {}),
    ("dit", DDIMScheduler, None, {"eta": 0.0}),
    ("dit", DDIMScheduler, 1.0, {}),
]


@pytest.mark.parametrize(("name", "sampler", "guidance", "options"), CASES)
def test_every_image_of_a_batch_is_that_of_the_stock_pipeline(
    pipelines: dict[str, Path], name: str, sampler: Any, guidance: float | None, options: dict[str, Any]
) -> None:
    denoiser = opened(pipelines, name)
    asked = prompts(denoiser)
    images = denoiser.generate(
        denoiser.module,
        sampler.from_config(denoiser.scheduler.config),
        asked,
        generators=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        num_inference_steps=4,
        guidance_scale=guidance,
        **options,
    )
    pipeline = stock(pipelines[name], KINDS[name], **EXTRA.get(name, {}))
    if sampler is not type(pipeline.scheduler):
        # Saved by a sampler that clips nothing, SDXL's config is silent on it, and DDPM would clip latents as pixels.
        silent = {} if "clip_sample" in pipeline.scheduler.config else {"clip_sample": False}
        pipeline.scheduler = sampler.from_config(pipeline.scheduler.config, **silent)
    given = {} if guidance is None else {"guidance_scale": guidance}
    given |= options if name != "dit" else {}  # DiT's pipeline has no eta
    for image, prompt, seed in zip(images, asked, (3, 4), strict=True):
        named = {"class_labels": [prompt]} if name == "dit" else {"prompt": prompt}
        generator = torch.Generator().manual_seed(seed)
        alone = pipeline(**named, **given, num_inference_steps=4, generator=generator, output_type="pt").images
        torch.testing.assert_close(image, alone[0] * 2 - 1, rtol=0, atol=2e-6)
    assert images.shape == (2, *denoiser.image_shape) and images.std() > 0.01
    assert denoiser.pipeline.components[denoiser.component] is denoiser.module


def test_old_configs_are_sampled_as_the_stock_pipeline_mends_them(pipelines: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(pipelines, "sd", tmp_path)
    rewritten(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    denoiser: Any = family("stable_diffusion").load(folder)
    scheduler = DDIMScheduler.from_config(denoiser.scheduler.config)
    with pytest.warns(FutureWarning):
        mended = stock(folder, "StableDiffusionPipeline").scheduler
    assert (scheduler.config.steps_offset, scheduler.config.clip_sample) == (1, False)
    assert dict(scheduler.config) == dict(mended.config)


def test_a_sampler_clips_no_latents_where_the_config_is_silent(pipelines: dict[str, Path]) -> None:
    for name in ("sdxl", "dit"):
        scheduler = opened(pipelines, name).scheduler
        assert DDIMScheduler.from_config(scheduler.config).config.clip_sample is False


@pytest.mark.parametrize("guidance", [1.0, None])
def test_the_noise_that_dit_is_sampled_with_is_each_images_own(
    pipelines: dict[str, Path], guidance: float | None
) -> None:
    denoiser, before = opened(pipelines, "dit"), torch.get_rng_state()
    both = generated(denoiser, [7, None], [1, 2], guidance_scale=guidance)
    alone = generated(denoiser, [None], [2], guidance_scale=guidance)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=2e-6)
    assert not torch.allclose(alone, generated(denoiser, [None], [3], guidance_scale=guidance))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dit_is_asked_by_number_or_name(pipelines: dict[str, Path]) -> None:
    denoiser = opened(pipelines, "dit")
    by_number = generated(denoiser, [2, 1, -1, 5], [1, 1, 1, 1])
    assert torch.equal(by_number, generated(denoiser, ["deux", "one", "", "5"], [1, 1, 1, 1]))
    with pytest.raises(UserError, match="no class is named 'dexu'; did you mean 'deux'"):
        generated(denoiser, ["dexu"], [1])


def test_what_the_dit_pipeline_cannot_sample_is_one_line(pipelines: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="EulerDiscreteScheduler scales its latents"):
        generated(opened(pipelines, "dit"), [7], [1], EulerDiscreteScheduler)
    ten: Any = family("dit").load(tiny.dit(tmp_path / "ten", classes=10, learned_variance=False))
    for guidance in (None, 2.0):
        with pytest.raises(UserError, match=r"guides models of 1000 classes only, and .*ten has 10"):
            generated(ten, [7], [1], guidance_scale=guidance)
    assert torch.isfinite(generated(ten, [7, -1], [1, 2], guidance_scale=1.0)).all()


@pytest.mark.parametrize("name", MADE)
def test_a_model_in_bfloat16_is_sampled_between_encoders_in_float32(pipelines: dict[str, Path], name: str) -> None:
    half, full = opened(pipelines, name, torch.bfloat16), opened(pipelines, name)
    assert half.module.dtype == torch.bfloat16
    images = generated(half, prompts(half), [1, 2])
    assert images.dtype == torch.float32
    difference = (images - generated(full, prompts(full), [1, 2])).abs().mean()
    assert 0 < difference < 0.1
    given = noised(half, [0, 7, 19])
    assert given.x_t.dtype == given.target.dtype == torch.float32
    assert half.answer(half.module, given).shape == (3, 4, 4, 4)


# --- the ensemble ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_an_ensemble_of_copies_is_the_base_through_the_whole_stock_pipeline(
    pipelines: dict[str, Path], name: str
) -> None:
    denoiser, asked = opened(pipelines, name), {}
    experts = [copy.deepcopy(denoiser.module) for _ in range(3)]
    for i, expert in enumerate(experts):
        expert.register_forward_hook(lambda *_, i=i: asked.__setitem__(i, asked.get(i, 0) + 1))
    loaders = [lambda expert=expert: expert for expert in experts]
    ensemble = RoutedEnsemble(loaders, uniform(3, T), denoiser.index, resident=2)
    pipeline = stock(pipelines[name], KINDS[name], **EXTRA.get(name, {}))
    named = {"class_labels": [7, 9]} if name == "dit" else {"prompt": ["a dog", "2 cats"]}
    made = []
    for module in (getattr(pipeline, denoiser.component), ensemble):
        pipeline.register_modules(**{denoiser.component: module})
        generator = torch.Generator().manual_seed(3)
        made.append(pipeline(**named, num_inference_steps=5, generator=generator, output_type="pt").images)
    assert torch.equal(*made)
    assert set(asked) == {0, 1, 2}
    assert ensemble.dtype == torch.float32 and ensemble.config == denoiser.module.config


@pytest.mark.parametrize("name", MADE)
def test_a_mixed_batch_of_an_ensemble_of_copies_is_the_bases(pipelines: dict[str, Path], name: str) -> None:
    denoiser = opened(pipelines, name)
    experts = [copy.deepcopy(denoiser.module) for _ in range(3)]
    loaders = [lambda expert=expert: expert for expert in experts]
    ensemble = RoutedEnsemble(loaders, uniform(3, T), denoiser.index)
    given = noised(denoiser, [19, 0, 7])
    found, base = (denoiser.answer(module, given) for module in (ensemble, denoiser.module))
    torch.testing.assert_close(found, base, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for parameter in experts[2].parameters():
            parameter.mul_(0.5)
    changed = denoiser.predict(ensemble, given.x_t, given.t, given.condition)
    assert not torch.allclose(changed[0], base[0], atol=1e-4)  # 19 is the third expert's
    torch.testing.assert_close(changed[1:], base[1:], rtol=1e-5, atol=1e-6)


class Answers(torch.nn.Module):
    """Keeps what it is asked, and answers as a stock transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.asked: list[dict[str, Any]] = []

    def forward(self, hidden_states: Any, encoder_hidden_states: Any = None, timestep: Any = None, **named: Any) -> Any:
        """A stock output object."""
        self.asked.append({"states": encoder_hidden_states, "timestep": timestep, **named})
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=hidden_states + self.weight)


def test_rows_of_nested_conditions_go_with_their_samples_and_those_of_no_sample_whole() -> None:
    experts = [Answers(), Answers()]
    ensemble = RoutedEnsemble([lambda e=e: e for e in experts], uniform(2, T), lambda t: (t * T).long())
    x, rows, ids = torch.randn(3, 2), torch.arange(3.0).view(3, 1), torch.arange(9.0).view(3, 3)
    answer = ensemble(
        hidden_states=x,
        encoder_hidden_states=rows,
        timestep=torch.tensor([0.95, 0.0, 0.9]),
        added={"pooled": rows, "deep": [rows]},
        img_ids=ids,
        scale=2.0,
    )
    assert type(answer).__name__ == "Transformer2DModelOutput" and torch.equal(answer.sample, x)
    high = experts[1].asked[0]
    for mine in (high["states"], high["added"]["pooled"], high["added"]["deep"][0]):
        assert mine.tolist() == [[0], [2]]
    assert torch.equal(high["img_ids"], ids) and high["scale"] == 2.0
    assert high["timestep"].tolist() == pytest.approx([0.95, 0.9])
    # By place, wherever the component's forward has it; a timestep for each token of a video counts by its largest.
    ensemble(x, rows, torch.tensor([[0.0, 0.9], [0.0, 0.0], [0.0, 0.95]]))
    assert experts[1].asked[1]["timestep"].shape == (2, 2) and experts[0].asked[1]["states"].tolist() == [[1]]
