"""Flow matching: sigmas, targets, the density of t, samplers; each family against its stock pipeline."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, UniPCMultistepScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

import tiny_flow
from deme_diffusion.config import ModelSettings, SamplerSettings
from deme_diffusion.density import index_density
from deme_diffusion.division import uniform
from deme_diffusion.divisions import log_snr
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.sample import make_scheduler, sample
from deme_diffusion.evaluation.samplers import OF_FLOWS, check_sampler, flow_names, names
from deme_diffusion.files import write_json
from deme_diffusion.models.ensemble import RoutedEnsemble
from deme_diffusion.models.families import family
from deme_diffusion.models.flow import FlowDenoiser
from deme_diffusion.models.weighting import min_snr_weights, p2_weights, snr_plus_one_weights, truncated_snr_weights
from deme_diffusion.pipeline.caching import covered
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.recipes.checks import parse
from deme_diffusion.schedule import FLOW_PREDICTION, flow_edges, flow_sigmas, in_sigma, is_flow, signal_to_noise
from deme_diffusion.weight_files import read_json
from tiny_flow import SEQUENCE, T

FAMILY = {"sd3": "stable_diffusion_3", "dev": "flux", "schnell": "flux", "wan": "wan"}
NAMES = list(FAMILY)
PROMPTS = ["a cat", "two dogs, red"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each kind."""
    folder = tmp_path_factory.mktemp("flow")
    return {
        "sd3": tiny_flow.stable_diffusion_3(folder / "sd3"),
        "dev": tiny_flow.flux(folder / "dev"),
        "schnell": tiny_flow.flux(folder / "schnell", dev=False),
        "wan": tiny_flow.wan(folder / "wan"),
    }


def settings_of(name: str, **said: Any) -> ModelSettings:
    """Of a tiny pipeline."""
    own = {"max_sequence_length": SEQUENCE, **({"resolution": 16} if name == "wan" else {})}
    return ModelSettings(family=FAMILY[name], **{**own, **said})  # type: ignore[arg-type]


def opened(folders: dict[str, Path], name: str, **said: Any) -> FlowDenoiser:
    """The family on a tiny pipeline."""
    denoiser = family(FAMILY[name]).load(folders[name])
    assert isinstance(denoiser, FlowDenoiser)
    denoiser.module.eval()
    denoiser.configure(settings_of(name, **said))
    return denoiser


@pytest.fixture(scope="module")
def denoisers(folders: dict[str, Path]) -> dict[str, FlowDenoiser]:
    """All of them, opened once."""
    return {name: opened(folders, name) for name in NAMES}


def stock(denoiser: FlowDenoiser, module: Any, scheduler: Any, seed: int, prompt: str, **options: Any) -> torch.Tensor:
    """One image (c, h, w) in [-1, 1] of a fresh stock pipeline."""
    kind = getattr(diffusers, denoiser.pipeline_kind)
    pipeline = kind.from_pretrained(denoiser.folder, scheduler=scheduler)
    pipeline.register_modules(transformer=module)
    pipeline.set_progress_bar_config(disable=True)
    height, width = denoiser.pixels
    frames = {"num_frames": 1} if denoiser.family == "wan" else {}
    images = pipeline(
        prompt,
        height=height,
        width=width,
        num_inference_steps=4,
        max_sequence_length=SEQUENCE,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **frames,
        **options,
    )[0]
    return (images[0, 0] if denoiser.family == "wan" else images[0]) * 2 - 1


# -- sigmas ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift": 7.5}, {"shift": 3.0, "use_dynamic_shifting": True}])
@pytest.mark.parametrize("count", [20, 1000])
def test_sigmas_are_the_scheduler_s_for_training(options: dict[str, Any], count: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=count, **options)
    ours = flow_sigmas(scheduler.config)
    assert is_flow(scheduler.config) and not is_flow(diffusers.DDIMScheduler().config)
    assert np.allclose(ours, scheduler.sigmas.numpy()[::-1], rtol=1e-6)
    assert (np.diff(ours) > 0).all() and ours[-1] == 1.0
    if not options.get("use_dynamic_shifting"):
        wan = UniPCMultistepScheduler(
            num_train_timesteps=count, use_flow_sigmas=True, flow_shift=options.get("shift", 1.0)
        )
        assert (flow_sigmas(wan.config) == ours).all()


@pytest.mark.parametrize("shift", [1.0, 3.0, 17.0])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_every_timestep_of_training_has_its_own_index(shift: float, scale: float) -> None:
    """Also in float32, and where a pipeline passes t / 1000."""
    config = {"_class_name": OF_FLOWS[0], "num_train_timesteps": 1000, "shift": shift}
    denoiser = OnlySigmas(config, scale)
    every = torch.arange(1000)
    assert torch.equal(denoiser.index(denoiser.asked_at(every)), every)
    asked = torch.from_numpy(denoiser.sigmas * 1000).float()
    assert torch.equal(denoiser.index_of_step(asked), every)
    assert torch.equal(denoiser.index((asked / 1000).to(torch.float32) * (1000 * scale)), every)
    between = (asked[1:] + asked[:-1]) / 2
    assert torch.equal(denoiser.index_of_step(between), every[:-1])
    assert denoiser.index_of_step(torch.tensor([0.0, 1000.0, 1e4])).tolist() == [0, 999, 999]


class OnlySigmas(FlowDenoiser):
    """A family without a model."""

    encode_captions = None  # type: ignore[assignment]
    predict = None  # type: ignore[assignment]

    def __init__(self, config: dict[str, Any], scale: float = 1.0, **said: Any) -> None:
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        self.timestep_scale = scale  # type: ignore[misc]
        self.settings = ModelSettings(family="flux", **said)


def test_subsets_cover_all_sigmas_exactly_once() -> None:
    sigmas = flow_sigmas({"_class_name": OF_FLOWS[0], "num_train_timesteps": T, "shift": 3.0})
    division = uniform(3, T)
    edges = flow_edges(sigmas)
    drawn = np.random.default_rng(0).random(2000)
    place = np.clip(np.searchsorted(edges, np.concatenate([drawn, sigmas]) * T, side="right") - 1, 0, T - 1)
    owners = [
        sum(low <= i < high for runs in [division.subset(e)] for low, high in runs) for e in range(3) for i in place
    ]
    assert np.reshape(owners, (3, -1)).sum(0).tolist() == [1] * len(place)
    told = [in_sigma(sigmas, division.subset(i)) for i in range(3)]
    assert told == ["[0, 0.6667)", "[0.6667, 0.9)", "[0.9, 1]"]
    assert in_sigma(sigmas, [[0, 1], [19, 20]]) == "[0, 0.25)+[1, 1]"


def test_snr_of_a_flow_and_the_division_by_it() -> None:
    config = {"_class_name": OF_FLOWS[0], "num_train_timesteps": T}
    snr = signal_to_noise(config)
    assert snr[9] == 1.0 and snr[-1] == 0.0 and (np.diff(snr) < 0).all()
    division = log_snr(2, snr)
    last, first = np.log(snr[-2]), np.log(snr[0])
    edge = division.served(1)[0][0]
    assert snr[edge] <= math.exp((first + last) / 2) < snr[edge - 1]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"shift": 0}, "the shift is 0; a number above 0 is needed"),
        ({"shift": "3"}, "the shift is '3'"),
        ({"invert_sigmas": True}, "invert_sigmas=true"),
    ],
)
def test_schedules_that_are_none_are_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"here: {message}")):
        flow_sigmas({"_class_name": OF_FLOWS[0], **said}, where="here")


# -- the density of t ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("logit_normal", {"logit_mean": 0.0, "logit_std": 1.0}),
        ("logit_normal", {"logit_mean": 0.7, "logit_std": 0.6}),
        ("mode", {"mode_scale": 1.29}),
        ("mode", {"mode_scale": -0.5}),
        ("uniform", {}),
    ],
)
def test_density_is_that_of_diffusers_scripts(scheme: str, options: dict[str, float]) -> None:
    """They train at timesteps[int(u T)] of a table that descends."""
    draws = 200_000
    u = compute_density_for_timestep_sampling(
        scheme, draws, **{"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, **options},
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    theirs = torch.bincount(T - 1 - (u * T).long().clamp(0, T - 1), minlength=T).numpy()
    denoiser = OnlySigmas({"_class_name": OF_FLOWS[0], "num_train_timesteps": T}, weighting_scheme=scheme, **options)
    density = denoiser.density
    assert density.sum() == pytest.approx(1, abs=1e-12)
    assert (np.abs(theirs - draws * density) < 5 * np.sqrt(draws * density) + 5).all()

    stratified = (np.arange(draws) + 0.5) / draws
    for subset in (np.arange(T), np.arange(3, 9), np.array([0, 1, 17, 19])):
        drawn = np.bincount(denoiser.timesteps(subset, stratified), minlength=T)
        assert set(np.flatnonzero(drawn)) <= set(subset)
        expected = density[subset] / density[subset].sum() * draws
        assert np.abs(drawn[subset] - expected).max() <= 2
        assert denoiser.mass(subset) == pytest.approx(density[subset].sum())
    parts = uniform(3, T)
    assert sum(denoiser.mass(np.flatnonzero(row)) for row in parts.member) == pytest.approx(1)


def test_family_densities_are_their_scripts(denoisers: dict[str, FlowDenoiser]) -> None:
    logit = index_density("logit_normal", T, mean=0.0, std=1.0, scale=1.29)
    assert (denoisers["sd3"].density == logit).all()
    for name in ("dev", "schnell", "wan"):
        assert (denoisers[name].density == 1 / T).all()


def test_ends_of_the_unit_interval_are_in_the_subset(denoisers: dict[str, FlowDenoiser]) -> None:
    subset = np.arange(5, 11)
    for name in ("sd3", "dev"):
        ends = denoisers[name].timesteps(subset, np.array([0.0, np.nextafter(1, 0)]))
        assert ends.tolist() == [5, 10]


def test_a_density_that_is_none_is_refused() -> None:
    config = {"_class_name": OF_FLOWS[0], "num_train_timesteps": T}
    narrow = OnlySigmas(config, weighting_scheme="logit_normal", logit_std=0.005)
    with pytest.raises(UserError, match=re.escape("model.weighting_scheme: the density of t is 0 on [0,3)")):
        narrow.timesteps(np.arange(3), np.array([0.5]))
    wide = OnlySigmas(config, weighting_scheme="mode", mode_scale=2.0)
    with pytest.raises(UserError, match=re.escape("model.mode_scale: 2; from -1 to 1.7519")):
        wide.timesteps(np.arange(3), np.array([0.5]))


# -- loss weightings -------------------------------------------------------------------------------


def test_weightings_of_the_x0_error_on_that_of_a_flow() -> None:
    """x_0 = x_t - sigma (eps - x_0): an error e of the prediction is one of sigma e in x_0, (1 - sigma) e in eps."""
    sigma = torch.from_numpy(flow_sigmas({"_class_name": OF_FLOWS[0], "num_train_timesteps": T, "shift": 3.0}))
    snr = ((1 - sigma) / sigma).square()
    on_x0, on_eps = sigma.square(), (1 - sigma).square()
    close = torch.testing.assert_close
    close(snr_plus_one_weights(snr, FLOW_PREDICTION), (snr + 1) * on_x0)
    close(truncated_snr_weights(snr, FLOW_PREDICTION), snr.clamp(min=1) * on_x0)
    close(min_snr_weights(snr, 5.0, FLOW_PREDICTION), snr.clamp(max=5) * on_x0)
    close(p2_weights(snr, 0.5, 1.0, FLOW_PREDICTION), (1 + snr) ** -0.5 * on_eps)


# -- one training step -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_one_training_step_by_the_schedulers_algebra(denoisers: dict[str, FlowDenoiser], name: str) -> None:
    denoiser = denoisers[name]
    shift = flow_sigmas(denoiser.scheduler.config)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        denoiser.scheduler.config, shift=3.0 if name in ("sd3", "wan") else 1.0, use_dynamic_shifting=False
    )
    images = torch.rand(3, *denoiser.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(3, *denoiser.sample_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 7, 19])
    noised = denoiser.noised({"image": images, "caption": ["a", "b c", ""]}, t, noise)
    clean = denoiser.encode_images(images)
    steps = scheduler.timesteps.flip(0)[t]
    torch.testing.assert_close(noised.x_t, scheduler.scale_noise(clean, steps, noise), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(denoiser.asked_at(t), steps * denoiser.timestep_scale)
    # Euler's step by the target from each t leads to the point of the t below: of the first one, to the clean image.
    for i, place in enumerate(t.tolist()):
        stepping = copy.deepcopy(scheduler)
        stepping.sigmas = torch.cat([scheduler.sigmas, torch.zeros(1)])
        reached = stepping.step(noised.target[i], steps[i], noised.x_t[i]).prev_sample
        below = shift[place - 1] if place else 0.0
        torch.testing.assert_close(reached, (1 - below) * clean[i] + below * noise[i], rtol=1e-4, atol=1e-5)
    answer = denoiser.predict(denoiser.module, noised.x_t, noised.t, noised.condition)
    assert answer.shape == noised.target.shape
    assert {key: value.shape for key, value in denoiser.placeholder(3).items()} == {
        key: value.shape for key, value in noised.condition.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_has_a_gradient_everywhere_and_the_caption_matters(
    denoisers: dict[str, FlowDenoiser], name: str
) -> None:
    denoiser = denoisers[name]
    module = copy.deepcopy(denoiser.module)
    x_t = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    condition = denoiser.encode_captions(["a", "zebra"])
    t = torch.tensor([4, 15])
    answer = denoiser.predict(module, x_t, t, condition)
    swapped = denoiser.predict(module, x_t, t, {key: value.flip(0) for key, value in condition.items()})
    assert (answer - swapped).abs().max() > 1e-4
    assert (answer - denoiser.predict(module, x_t, t.flip(0), condition)).abs().max() > 1e-4
    answer.square().mean().backward()
    idle = {key for key, value in module.named_parameters() if value.grad is None}
    assert not idle


def test_flux_packs_as_its_pipeline_does(denoisers: dict[str, FlowDenoiser]) -> None:
    for name in ("dev", "schnell"):
        denoiser = denoisers[name]
        x_t = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
        condition, t = denoiser.encode_captions(PROMPTS), torch.tensor([4, 15])
        tokens = denoiser.module(
            hidden_states=FluxPipeline._pack_latents(x_t, 2, 4, 4, 4),
            timestep=torch.tensor([5.0, 16.0]) / 1000,
            guidance=torch.ones(2) if name == "dev" else None,
            txt_ids=torch.zeros(SEQUENCE, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 2, 2, "cpu", torch.float32),
            return_dict=False,
            **condition,
        )[0]
        expected = FluxPipeline._unpack_latents(tokens, 8, 8, 2)
        torch.testing.assert_close(denoiser.predict(denoiser.module, x_t, t, condition), expected)


def test_captions_that_are_cut(denoisers: dict[str, FlowDenoiser]) -> None:
    for denoiser in denoisers.values():
        assert denoiser.truncated(["a" * (SEQUENCE - 1), "a" * SEQUENCE, ""]) == [False, True, False]


def test_wan_trains_on_videos_that_were_encoded(folders: dict[str, Path]) -> None:
    denoiser = opened(folders, "wan", num_frames=9)
    assert denoiser.sample_shape == (4, 3, 2, 2) and denoiser.image_shape == (3, 16, 16)
    latent, noise = (torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    condition = denoiser.encode_captions(PROMPTS)
    noised = denoiser.noised({"latent": latent, "condition": condition}, torch.tensor([3, 9]), noise)
    assert torch.equal(noised.target, noise - latent)
    assert denoiser.predict(denoiser.module, noised.x_t, noised.t, noised.condition).shape == latent.shape
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    frames = denoiser.generate(
        denoiser.module, denoiser.scheduler, PROMPTS, generators=generators, num_inference_steps=2
    )
    assert frames.shape == (2, 3, 16, 16)


def test_an_image_is_a_video_that_stands_still(folders: dict[str, Path]) -> None:
    """Its latents are the encoder's, of which the first, of one frame alone, is another than the others."""
    denoiser = opened(folders, "wan", num_frames=9)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = diffusers.AutoencoderKLWan.from_pretrained(folders["wan"] / "vae")
    with torch.no_grad():
        video = vae.encode(torch.stack([images] * 9, dim=2)).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    latent, noise = (video - mean) / std, torch.zeros(2, *denoiser.sample_shape)
    noised = denoiser.noised({"image": images, "caption": PROMPTS}, torch.tensor([0, 3]), noise)
    torch.testing.assert_close(noised.target, -latent, rtol=1e-4, atol=1e-5)
    assert (latent[:, :, 0] - latent[:, :, 1]).abs().max() > 1e-3


def test_latents_of_another_shape_are_refused_and_not_broadcast(folders: dict[str, Path]) -> None:
    denoiser = opened(folders, "wan", num_frames=9)
    batch = {"latent": torch.zeros(2, 4, 1, 2, 2), "condition": denoiser.placeholder(2)}
    with pytest.raises(UserError, match=r"latents of 4x1x2x2, but .* takes 4x3x2x2 as the recipe has it"):
        denoiser.noised(batch, torch.tensor([0, 3]), torch.zeros(2, *denoiser.sample_shape))


def test_a_caption_is_cut_if_any_tokenizer_cuts_it(folders: dict[str, Path]) -> None:
    denoiser = opened(folders, "sd3", max_sequence_length=20)  # CLIP's keep 12 tokens
    assert denoiser.truncated(["a" * 10, "a" * 11, "a" * 20]) == [False, True, True]
    without = opened(folders, "sd3", max_sequence_length=20)
    without.pipeline.register_modules(text_encoder_3=None)
    assert without.truncated(["a" * 10, "a" * 11]) == [False, True]


def test_what_a_distilled_model_is_told_in_training(folders: dict[str, Path]) -> None:
    plain, told = opened(folders, "dev"), opened(folders, "dev", training_guidance=3.5)
    x_t = torch.randn(2, *plain.sample_shape, generator=torch.Generator().manual_seed(0))
    condition, t, asked = plain.encode_captions(PROMPTS), torch.tensor([4, 15]), []
    for denoiser in (plain, told):
        hook = denoiser.module.register_forward_pre_hook(
            lambda _, args, kwargs: asked.append(kwargs["guidance"].tolist()), with_kwargs=True
        )
        denoiser.predict(denoiser.module, x_t, t, condition)
        hook.remove()
    assert asked == [[1.0, 1.0], [3.5, 3.5]]
    assert settings_of("dev", training_guidance=3.5).shaping()["training_guidance"] == 3.5
    assert "training_guidance" not in settings_of("dev", training_guidance=1.0).shaping()
    with pytest.raises(UserError, match=r"model\.training_guidance: .*schnell is told no guidance; leave it out"):
        opened(folders, "schnell", training_guidance=3.5)


def test_of_the_settings_a_cache_covers_those_that_shape_what_is_encoded() -> None:
    model = {"max_sequence_length": 64, "resolution": 64, "num_frames": 5, "logit_mean": 0.5}
    values = {"model": {"family": "wan", "pretrained": "x", **model}, "data": {"source": "folder", "path": "x"}}
    assert covered(parse(values, where="here")) == {
        "family": "wan", "max_sequence_length": 64, "resolution": 64, "num_frames": 5
    }  # fmt: skip
    values["model"] = {"family": "flux", "pretrained": "x", "training_guidance": 3.5}
    assert covered(parse(values, where="here")) == {"family": "flux"}


# -- sampling --------------------------------------------------------------------------------------


def test_a_timestep_that_the_pipeline_rounds_is_the_sampler_s(tmp_path: Path) -> None:
    """Flux's pipeline passes t / 1000 in bfloat16, which has no number between 0.5 and 0.504."""
    folder = tiny_flow.flux(tmp_path / "flux", num_train_timesteps=1000)
    denoiser = opened({"dev": folder}, "dev", encoder_dtype="bfloat16")
    asked, rounded = list[int](), list[torch.dtype]()

    def look(_: Any, args: Any, kwargs: Any) -> None:
        asked.append(int(denoiser.index(kwargs["timestep"])))
        rounded.append(kwargs["timestep"].dtype)

    hook = denoiser.module.register_forward_pre_hook(look, with_kwargs=True)
    scheduler = make_scheduler(denoiser, SamplerSettings(name=OF_FLOWS[0], num_inference_steps=40))
    denoiser.generate(
        denoiser.module, scheduler, ["x"], generators=[torch.Generator().manual_seed(0)], num_inference_steps=40
    )
    hook.remove()
    assert set(rounded) == {torch.bfloat16} and len(asked) == 40
    assert asked == denoiser.index_of_step(scheduler.timesteps).tolist()
    after = denoiser.index((scheduler.timesteps.bfloat16() / 1000).to(torch.bfloat16)).tolist()
    assert after != asked, "outside of sampling there is no step to go by"


def test_only_what_a_scheduler_raises_is_laid_to_the_sampler(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, sampler = opened(folders, "sd3"), SamplerSettings(name=OF_FLOWS[0], num_inference_steps=2)
    asked = denoiser.asked
    with monkeypatch.context() as patch:
        patch.setattr(denoiser, "asked", lambda *given: {**asked(*given), "max_sequence_length": 600})
        with pytest.raises(UserError, match=r"^the stock pipeline refuses what it is asked for: .*greater than 512"):
            sample(denoiser, denoiser.module, sampler, [0], prompts=["x"])

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("of our own")

    monkeypatch.setattr(denoiser.module, "forward", broken)
    with pytest.raises(ValueError, match="of our own"):
        sample(denoiser, denoiser.module, sampler, [0], prompts=["x"])


@pytest.mark.parametrize("name", NAMES)
def test_generate_is_the_stock_pipeline(denoisers: dict[str, FlowDenoiser], name: str) -> None:
    denoiser = denoisers[name]
    sampler = SamplerSettings(name=OF_FLOWS[0], num_inference_steps=4)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    found = denoiser.generate(
        denoiser.module, make_scheduler(denoiser, sampler), PROMPTS, generators=generators, num_inference_steps=4
    )
    for i, prompt in enumerate(PROMPTS):
        expected = stock(denoiser, denoiser.module, make_scheduler(denoiser, sampler), i, prompt)
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=2e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_ensemble_of_copies_is_the_base_through_the_stock_pipeline(
    denoisers: dict[str, FlowDenoiser], name: str
) -> None:
    denoiser = denoisers[name]
    copies = [copy.deepcopy(denoiser.module) for _ in range(3)]
    ensemble = RoutedEnsemble([lambda i=i: copies[i] for i in range(3)], uniform(3, T), denoiser.index)
    sampler = SamplerSettings(name=OF_FLOWS[0], num_inference_steps=4)
    asked: list[list[int]] = [[], [], []]
    for expert, seen in zip(copies, asked, strict=True):
        expert.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(int(denoiser.index(kwargs["timestep"]).max())),
            with_kwargs=True,
        )
    same = [
        stock(denoiser, module, make_scheduler(denoiser, sampler), 3, "a cat") for module in (denoiser.module, ensemble)
    ]
    torch.testing.assert_close(*same, rtol=1e-5, atol=1e-6)  # copies may lie otherwise in memory, for the kernels
    route = uniform(3, T).route
    assert all(route[t] == i for i, seen in enumerate(asked) for t in seen) and asked[2] and sum(map(len, asked)) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_every_flow_sampler_samples_or_is_refused_and_each_of_its_steps_has_an_index(
    denoisers: dict[str, FlowDenoiser], name: str
) -> None:
    denoiser, asked, worked = denoisers[name], list[torch.Tensor](), []
    hook = denoiser.module.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["timestep"].detach().flatten()[:1]), with_kwargs=True
    )
    edges = (denoiser.sigmas - 0.05 * np.diff(denoiser.sigmas, prepend=0)) * T
    for sampler in flow_names():
        try:
            scheduler = make_scheduler(denoiser, SamplerSettings(name=sampler, num_inference_steps=5))
        except UserError as error:
            assert name in ("dev", "schnell") and f"take {OF_FLOWS[0]}" in str(error)
            continue
        asked.clear()
        images = denoiser.generate(
            denoiser.module, scheduler, ["x"], generators=[torch.Generator().manual_seed(0)], num_inference_steps=5
        )
        assert torch.isfinite(images).all() and images.std() > 0, sampler
        steps = scheduler.timesteps.double()
        got = torch.cat(asked).double()[:: len(asked) // len(steps)]  # guidance may ask twice
        torch.testing.assert_close(got, steps * denoiser.timestep_scale, rtol=1e-5, atol=1e-7)
        expected = [max([i for i in range(T) if edges[i] <= float(step) + 1e-5] or [0]) for step in steps]
        assert denoiser.index(torch.cat(asked))[:: len(asked) // len(steps)].tolist() == expected, sampler
        assert denoiser.index_of_step(scheduler.timesteps).tolist() == expected
        worked.append(sampler)
    hook.remove()
    few = {"dev": {OF_FLOWS[1]}, "schnell": set(flow_names()) - {OF_FLOWS[0], "UniPCMultistepScheduler"}}
    assert set(worked) == set(flow_names()) - few.get(name, set())


# -- what is refused -------------------------------------------------------------------------------


def test_samplers_of_the_other_kind_are_refused_with_the_nearest() -> None:
    def said(name: str, kind: str, **options: Any) -> str:
        with pytest.raises(UserError) as refused:
            check_sampler(SamplerSettings(name=name, num_inference_steps=4, **options), T, key="here", family=kind)
        return str(refused.value)

    assert said("DDIMScheduler", "flux") == (
        "here: DDIMScheduler samples on a schedule of betas, and family flux matches flows; "
        "take FlowMatchEulerDiscreteScheduler"
    )
    assert said("HeunDiscreteScheduler", "wan").endswith("take FlowMatchHeunDiscreteScheduler")
    assert said("FlowMatchHeunDiscreteScheduler", "dit").endswith("take HeunDiscreteScheduler")
    assert "did you mean 'FlowMatchEulerDiscreteScheduler'" in said("FlowMatchEuler", "flux")
    assert "leave timestep_spacing null" in said("UniPCMultistepScheduler", "wan", timestep_spacing="trailing").replace(
        "it null", "timestep_spacing null"
    )
    assert said(OF_FLOWS[0], "flux", eta=0.5).endswith("leave it 0")
    for name in flow_names():
        check_sampler(SamplerSettings(name=name, num_inference_steps=T), T, key="here", family="wan")
    assert set(flow_names()) - set(OF_FLOWS) < set(names())


def test_a_recipe_that_leaves_the_samplers_of_betas_is_told_in_one_line(folders: dict[str, Path]) -> None:
    values = {
        "model": {"family": "wan", "pretrained": str(folders["wan"]), "resolution": 16},
        "evaluate": {"samplers": [{"name": name, "num_inference_steps": 2} for name in OF_FLOWS], "num_images": 8},
        "analyze": {"figures": []},
        "decouple": {"num_ranges": 2, "loss_weighting": "snr_plus_one"},
    }
    with pytest.raises(UserError, match=re.escape("merge.sampler: DDIMScheduler samples on a schedule of betas")):
        Graph(parse(values, where="here"))
    own = {"merge": {"sampler": {"name": "UniPCMultistepScheduler", "num_inference_steps": 2}}}
    graph = Graph(parse({**values, **own}, where="here"))
    assert graph.remarks[0] == "in sigma: expert 0 [0, 0.7857), expert 1 [0.7857, 1]"
    assert (
        Graph(
            parse({**values, **own, "decouple": {"num_ranges": 2, "division": "log_snr"}}, where="here")
        ).division.num_experts
        == 2
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"family": "ddpm", "resolution": 32}, "model.resolution: family ddpm does not know it"),
        ({"family": "stable_diffusion", "weighting_scheme": "mode"}, "model.weighting_scheme: family stable_diffusion"),
        ({"family": "flux", "num_frames": 5}, "model.num_frames: family flux does not know it (wan do)"),
        ({"family": "wan", "training_guidance": 2}, "model.training_guidance: family wan does not know it (flux do)"),
        ({"family": "flux", "max_sequence_length": 513}, "max_sequence_length: 513; flux takes at most 512"),
        ({"family": "stable_diffusion_3", "max_sequence_length": 600}, "stable_diffusion_3 takes at most 512"),
    ],
)
def test_settings_of_other_families_are_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelSettings(**said)


def test_sizes_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"model.resolution: 10 is no multiple of 4.* did you mean 8\?"):
        _ = opened(folders, "dev", resolution=10).sample_shape
    with pytest.raises(UserError, match=r"model.num_frames: 4; .* such as 1"):
        _ = opened(folders, "wan", num_frames=4).sample_shape
    assert opened(folders, "wan", resolution=None).image_shape == (3, 480, 832)


@pytest.mark.parametrize("name", ["sd3", "dev", "wan"])
def test_another_scheduler_or_model_is_refused(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    def changed(file: str, **said: Any) -> Path:
        folder = tmp_path / file.replace("/", "-")
        folder.mkdir()
        for part in folders[name].iterdir():
            (folder / part.name).symlink_to(part)
        (folder / file).parent.resolve().name  # noqa: B018
        values = read_json(folders[name] / file)
        if "/" in file:
            part = folder / file.split("/")[0]
            part.unlink()
            part.mkdir()
            for old in (folders[name] / part.name).iterdir():
                (part / old.name).symlink_to(old)
        (folder / file).unlink()
        write_json(folder / file, {**values, **said})
        return folder

    kind = family(FAMILY[name])
    with pytest.raises(UserError, match="a DDPMScheduler without flow sigmas, but family"):
        kind.load(changed("scheduler/scheduler_config.json", _class_name="DDPMScheduler", use_flow_sigmas=False))
    with pytest.raises(UserError, match="99 input channels where latents give"):
        kind.load(changed("transformer/config.json", in_channels=99))
    if name == "wan":
        with pytest.raises(UserError, match="a pair of experts, transformer and transformer_2"):
            kind.load(changed("model_index.json", boundary_ratio=0.9))
