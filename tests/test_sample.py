"""A seed an image: samples depend neither on batches, nor on interruptions, nor on any other randomness."""

import copy
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch

from conftest import T, make_pico_denoiser
from deme_diffusion.config import PretrainSettings, SamplerSettings
from deme_diffusion.data.splits import to_pixels
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation import sample as sampling
from deme_diffusion.evaluation.sample import (
    CURSOR,
    IMAGES,
    image_seeds,
    make_scheduler,
    sample,
    sample_pixels,
    sample_seeds_to,
    sample_to,
)
from deme_diffusion.evaluation.samplers import UNUSABLE, check_sampler, names, parameters, sampler_options
from deme_diffusion.models.ddpm import DDPM

DDIM = SamplerSettings(num_inference_steps=4)
NOISY_DDIM = SamplerSettings(num_inference_steps=4, eta=1.0)
DDPM_SAMPLER = SamplerSettings(name="DDPMScheduler", num_inference_steps=5)
SAMPLERS = pytest.mark.parametrize("sampler", [DDIM, NOISY_DDIM, DDPM_SAMPLER], ids=lambda s: s.label)


def in_batches(denoiser: DDPM, sampler: SamplerSettings, count: int, size: int) -> torch.Tensor:
    firsts = range(0, count, size)
    seeds = [image_seeds(0, first, min(size, count - first)) for first in firsts]
    return torch.cat([sample(denoiser, denoiser.module, sampler, own) for own in seeds])


class Recorder(torch.nn.Module):
    """Keeps what the component is asked, and answers as it does."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.asked = module, list[torch.Tensor]()

    def forward(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> Any:
        self.asked.append(x.clone())
        return self.module(x, t, **kwargs)


# how many, and how they are batched


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 64])
def test_exactly_n_images_whatever_the_batch_size(tmp_path: Path, pico_denoiser: DDPM, batch_size: int) -> None:
    done: list[int] = []
    sample_to(tmp_path, pico_denoiser, pico_denoiser.module, DDIM, seed=0, count=10, batch_size=batch_size,
              progress=done.append)  # fmt: skip
    images = np.load(tmp_path / IMAGES)
    assert (images.shape, images.dtype) == ((10, 8, 8, 1), np.uint8)
    assert done == [*range(batch_size, 10, batch_size), 10]
    pixels = sample_pixels(pico_denoiser, pico_denoiser.module, DDIM, seed=0, count=10, batch_size=batch_size)
    assert np.array_equal(images, pixels)


@SAMPLERS
def test_initial_noise_is_bit_equal_whatever_the_batch_size(pico_denoiser: DDPM, sampler: SamplerSettings) -> None:
    noise = []
    for size in (1, 3, 8):
        recorder = Recorder(pico_denoiser.module)
        for first in range(0, 8, size):
            sample(pico_denoiser, recorder, sampler, image_seeds(0, first, min(size, 8 - first)))
        steps = len(make_scheduler(pico_denoiser, sampler).timesteps)
        noise.append(torch.cat(recorder.asked[::steps]))
    assert noise[0].shape == (8, 1, 8, 8)
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise[0], noise[2])


@SAMPLERS
def test_images_are_equal_whatever_the_batch_size(pico_denoiser: DDPM, sampler: SamplerSettings) -> None:
    alone, threes, eights = (in_batches(pico_denoiser, sampler, 8, size) for size in (1, 3, 8))
    torch.testing.assert_close(threes, alone, rtol=0, atol=1e-3)
    torch.testing.assert_close(eights, alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", [NOISY_DDIM, DDPM_SAMPLER], ids=lambda s: s.label)
def test_ancestral_noise_belongs_to_the_image_not_to_its_place_in_the_batch(
    pico_denoiser: DDPM, sampler: SamplerSettings
) -> None:
    images = sample(pico_denoiser, pico_denoiser.module, sampler, [7, 7, 8])
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_eta_adds_noise_to_the_same_start(pico_denoiser: DDPM) -> None:
    still, noisy = (in_batches(pico_denoiser, sampler, 2, 2) for sampler in (DDIM, NOISY_DDIM))
    assert (still - noisy).abs().amax(dim=(1, 2, 3)).min() > 1e-2


def test_seeds_of_images_do_not_repeat_and_do_not_depend_on_where_a_batch_begins() -> None:
    seeds = image_seeds(3, 0, 1000)
    assert len(set(seeds)) == 1000
    assert image_seeds(3, 400, 10) == seeds[400:410]
    assert not set(seeds) & set(image_seeds(4, 0, 1000))


def numpy_state() -> str:
    return repr(np.random.get_state())  # noqa: NPY002 - the global state is what must stay


@SAMPLERS
def test_global_randomness_is_neither_used_nor_moved(pico_denoiser: DDPM, sampler: SamplerSettings) -> None:
    torch.manual_seed(1)
    before, numpy_before = torch.get_rng_state(), numpy_state()
    first = sample(pico_denoiser, pico_denoiser.module, sampler, image_seeds(0, 0, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert numpy_state() == numpy_before
    torch.manual_seed(2)
    assert torch.equal(sample(pico_denoiser, pico_denoiser.module, sampler, image_seeds(0, 0, 3)), first)


def test_sampling_seed_changes_every_image(pico_denoiser: DDPM) -> None:
    zero, one = (in_batches(pico_denoiser, DDIM, 4, 4), sample(pico_denoiser, pico_denoiser.module, DDIM,
                                                              image_seeds(1, 0, 4)))  # fmt: skip
    assert (zero != one).flatten(1).any(1).all()


# going on


def stop_after(images: int) -> Callable[[int], None]:
    def stop(done: int) -> None:
        if done >= images:
            raise KeyboardInterrupt

    return stop


@SAMPLERS
def test_interrupted_sampling_goes_on_to_the_same_bits(
    tmp_path: Path, pico_denoiser: DDPM, sampler: SamplerSettings
) -> None:
    def run(folder: Path, module: torch.nn.Module, progress: Callable[[int], None] = lambda done: None) -> None:
        folder.mkdir(exist_ok=True)
        sample_to(folder, pico_denoiser, module, sampler, seed=5, count=10, batch_size=3, progress=progress)

    run(tmp_path / "whole", pico_denoiser.module)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", pico_denoiser.module, stop_after(6))
    assert json.loads((tmp_path / "parts" / CURSOR).read_text()) == {"done": 6}
    recorder = Recorder(pico_denoiser.module)
    run(tmp_path / "parts", recorder)
    assert sum(len(x) for x in recorder.asked) == 4 * len(make_scheduler(pico_denoiser, sampler).timesteps)
    assert (tmp_path / "parts" / IMAGES).read_bytes() == (tmp_path / "whole" / IMAGES).read_bytes()


def test_finished_sampling_is_not_done_again(tmp_path: Path, pico_denoiser: DDPM) -> None:
    options: dict[str, Any] = {"seed": 5, "count": 6, "batch_size": 4}
    sample_to(tmp_path, pico_denoiser, pico_denoiser.module, DDIM, **options)
    before = (tmp_path / IMAGES).read_bytes()
    recorder = Recorder(pico_denoiser.module)
    sample_to(tmp_path, pico_denoiser, recorder, DDIM, **options)
    assert not recorder.asked
    assert (tmp_path / IMAGES).read_bytes() == before


def test_images_that_were_cut_short_are_all_made_again(tmp_path: Path, pico_denoiser: DDPM) -> None:
    options: dict[str, Any] = {"seed": 5, "count": 6, "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        sample_to(tmp_path, pico_denoiser, pico_denoiser.module, DDIM, **options, progress=stop_after(4))
    (tmp_path / IMAGES).write_bytes((tmp_path / IMAGES).read_bytes()[:-200])  # a part of what the cursor calls done
    sample_to(tmp_path, pico_denoiser, pico_denoiser.module, DDIM, **options)
    expected = sample_pixels(pico_denoiser, pico_denoiser.module, DDIM, **options)
    assert np.array_equal(np.load(tmp_path / IMAGES), expected)


def test_non_finite_images_are_a_user_error_and_nothing_is_counted_as_done(tmp_path: Path, pico_denoiser: DDPM) -> None:
    with torch.no_grad():
        pico_denoiser.module.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="DDIM-4: the model samples non-finite images"):
        sample_to(tmp_path, pico_denoiser, pico_denoiser.module, DDIM, seed=0, count=4, batch_size=2)
    assert not (tmp_path / CURSOR).exists()


# schedulers


def test_a_folder_is_begun_only_once_a_first_batch_is_there(tmp_path: Path, pico_denoiser: DDPM) -> None:
    broken, folder, begun = copy.deepcopy(pico_denoiser.module), tmp_path / "own", list[bool]()
    with torch.no_grad():
        broken.conv_out.bias.fill_(float("nan"))

    def begin() -> None:
        begun.append(folder.exists())
        folder.mkdir()

    with pytest.raises(UserError, match="non-finite"):
        sample_seeds_to(folder, pico_denoiser, broken, DDIM, [1, 2, 3], batch_size=2, begin=begin)
    assert not folder.exists() and not begun
    sample_seeds_to(folder, pico_denoiser, pico_denoiser.module, DDIM, [1, 2, 3], batch_size=2, begin=begin)
    assert begun == [False] and len(np.load(folder / IMAGES)) == 3


def test_unknown_sampler_is_a_user_error_with_the_nearest_name(pico_denoiser: DDPM) -> None:
    with pytest.raises(UserError, match=r"'DDIMSchedule' is no sampler of .*; did you mean 'DDIMScheduler'\?"):
        make_scheduler(pico_denoiser, SamplerSettings(name="DDIMSchedule"))


def test_more_steps_than_the_model_has_are_a_user_error(pico_denoiser: DDPM) -> None:
    with pytest.raises(UserError, match="21 steps of DDIMScheduler, but the model has 20"):
        make_scheduler(pico_denoiser, SamplerSettings(num_inference_steps=21))
    assert len(make_scheduler(pico_denoiser, SamplerSettings(num_inference_steps=20)).timesteps) == 20


def test_sampler_runs_on_the_checkpoint_s_own_noise_schedule(pico_denoiser: DDPM) -> None:
    for settings in (DDIM, DDPM_SAMPLER):
        scheduler = make_scheduler(pico_denoiser, settings)
        assert torch.equal(scheduler.alphas_cumprod, pico_denoiser.scheduler.alphas_cumprod)
        assert scheduler.config.prediction_type == pico_denoiser.prediction_type


def test_timestep_spacing_moves_the_timesteps(pico_denoiser: DDPM) -> None:
    spacings = ["leading", "trailing", "linspace"]
    settings = [SamplerSettings.model_validate({"num_inference_steps": 4, "timestep_spacing": s}) for s in spacings]
    asked = [make_scheduler(pico_denoiser, own).timesteps.tolist() for own in settings]
    assert asked == [[15, 10, 5, 0], [19, 14, 9, 4], [19, 13, 6, 0]]


def test_samplers_give_different_images(pico_denoiser: DDPM) -> None:
    settings = [DDIM, NOISY_DDIM, DDPM_SAMPLER, SamplerSettings(name="EulerDiscreteScheduler", num_inference_steps=4),
                SamplerSettings(name="DPMSolverMultistepScheduler", num_inference_steps=4)]  # fmt: skip
    images = [in_batches(pico_denoiser, own, 2, 2) for own in settings]
    assert all(image.isfinite().all() for image in images)
    for i, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[:i])


STOCK = [
    ("DDIM", {"num_inference_steps": 4}),
    ("DDIM", {"num_inference_steps": 4, "eta": 1.0}),
    ("DDIM", {"num_inference_steps": T, "eta": 0.5}),
    ("DDPM", {"num_inference_steps": 5}),
    ("DDPM", {"num_inference_steps": T}),
]


@pytest.mark.parametrize(("name", "options"), STOCK, ids=str)
def test_the_image_of_a_seed_is_that_of_the_stock_pipeline(
    pico_denoiser: DDPM, name: str, options: dict[str, Any]
) -> None:
    """Whatever the batch: each image of ours against the stock pipeline's with batch 1 and that seed's generator."""
    images = stock_images(pico_denoiser, name, options, [11, 5, 2**40])
    settings = SamplerSettings(name=f"{name}Scheduler", **options)
    ours = sample(pico_denoiser, pico_denoiser.module, settings, [11, 5, 2**40])
    # The stock pipeline returns (image / 2 + 0.5), clamped, channels last.
    np.testing.assert_allclose(ours.clamp(-1, 1).permute(0, 2, 3, 1).numpy() / 2 + 0.5, images, atol=1e-5)
    assert not np.allclose(images[0], images[1], atol=1e-2)


def stock_images(denoiser: DDPM, name: str, options: dict[str, Any], seeds: list[int]) -> npt.NDArray[np.float32]:
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(denoiser.scheduler.config)
    pipeline = getattr(diffusers, f"{name}Pipeline")(denoiser.module, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return np.concatenate([pipeline(generator=g, output_type="np", **options).images for g in generators])


def test_ddpm_at_its_full_length_of_1000_steps_is_the_stock_pipeline_s() -> None:
    values = {"sample_size": 4, "block_out_channels": (4, 4), "norm_num_groups": 1, "attention_head_dim": 4}
    settings = PretrainSettings.model_validate({"unet": values, "scheduler": {"num_train_timesteps": 1000}})
    denoiser = DDPM.from_scratch(settings, out_seed=0)
    stock = stock_images(denoiser, "DDPM", {"num_inference_steps": 1000}, [3])
    sampler = SamplerSettings(name="DDPMScheduler", num_inference_steps=1000)
    ours = sample(denoiser, denoiser.module, sampler, [3])
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy() / 2 + 0.5, stock, atol=1e-5)


# every sampler that diffusers lists


@pytest.mark.parametrize("name", sorted(set(names()) - set(UNUSABLE)))
def test_steps_that_begin_beyond_the_timesteps_are_those_that_are_refused(name: str) -> None:
    base = diffusers.PNDMScheduler(num_train_timesteps=T, steps_offset=1, skip_prk_steps=True)
    for spacing in (
        (None, "leading", "trailing", "linspace") if "timestep_spacing" in parameters(name, "__init__") else ()
    ):
        for steps in (1, 4, T // 2, T - 2, T - 1, T):
            settings = SamplerSettings(name=name, num_inference_steps=steps, timestep_spacing=spacing)
            given = {"timestep_spacing": spacing} if spacing else {}
            scheduler = getattr(diffusers, name).from_config(base.config, **given)
            scheduler.set_timesteps(steps)
            if max(float(t) for t in scheduler.timesteps) < T:
                sampler_options(settings, base.config)
                continue
            with pytest.raises(UserError, match=rf"^sampler: {steps} steps of {name} begin beyond") as refused:
                sampler_options(settings, base.config)
            most = re.search(r"at most (\d+) steps", str(refused.value))
            assert most is not None
            scheduler.set_timesteps(int(most[1]))
            assert max(float(t) for t in scheduler.timesteps) == T - 1


@pytest.mark.parametrize("name", names())
def test_every_sampler_of_diffusers_works_or_is_refused_in_one_line(pico_denoiser: DDPM, name: str) -> None:
    """Finite images that depend on their seeds alone, at the fewest, few, and the most steps."""
    accepted = 0
    for steps in (1, 3, 4, T - 1, T):
        settings = SamplerSettings(name=name, num_inference_steps=steps)
        try:
            check_sampler(settings, T, key="merge.sampler")
        except UserError as refusal:
            assert str(refusal).startswith("merge.sampler: ") and name in str(refusal) and "\n" not in str(refusal)
            continue
        accepted += 1
        torch.manual_seed(steps)
        images = sample(pico_denoiser, pico_denoiser.module, settings, [1, 2])
        assert images.isfinite().all() and not torch.equal(images[0], images[1])
        alone = sample(pico_denoiser, pico_denoiser.module, settings, [2])
        torch.testing.assert_close(images[1:], alone, rtol=0, atol=1e-4)
    assert accepted >= (0 if name in UNUSABLE else 3)


def test_samplers_and_what_they_accept_are_read_from_the_source_as_they_are() -> None:
    from diffusers.schedulers import KarrasDiffusionSchedulers

    assert list(names()) == list(KarrasDiffusionSchedulers.__members__)
    for name in set(names()) - set(UNUSABLE):
        for method in ("__init__", "step"):
            signature = set(inspect.signature(getattr(getattr(diffusers, name), method)).parameters)
            assert signature - {"self", "kwargs"} == parameters(name, method) - {"self"}, (name, method)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "DDPMScheduler", "eta": 0.5}, "DDPMScheduler has no eta, given as 0.5; leave it 0"),
        ({"name": "UniPCMultistepScheduler", "eta": 1}, "UniPCMultistepScheduler has no eta"),
        ({"name": "DPMSolverSinglestepScheduler", "timestep_spacing": "trailing"}, "has no timestep_spacing, given"),
        (
            {"name": "FlowMatchEulerDiscreteScheduler"},
            "FlowMatchEulerDiscreteScheduler is for flow matching, and family ddpm has a schedule of betas; "
            "take EulerDiscreteScheduler",
        ),
        ({"name": "EDMEulerScheduler"}, "EDMEulerScheduler cannot be used: its noise levels"),
        ({"name": "DPMSolverSDEScheduler"}, "DPMSolverSDEScheduler cannot be used: it draws noise without generators"),
        ({"name": "UniPCMultistepScheduler", "num_inference_steps": T}, f"which takes at most {T - 1} of {T}"),
        ({"name": "PNDMScheduler", "num_inference_steps": 3}, "takes 4 or more"),
    ],
)
def test_settings_that_a_sampler_would_ignore_or_fail_on_are_refused(values: dict[str, Any], said: str) -> None:
    settings = SamplerSettings.model_validate({"num_inference_steps": 4, **values})
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        check_sampler(settings, T, key="evaluate.samplers.0", family="ddpm")
    assert str(refused.value).startswith("evaluate.samplers.0: ")


def test_a_prediction_that_a_sampler_does_not_know_is_one_line() -> None:
    denoiser = make_pico_denoiser(prediction_type="sample")
    settings = SamplerSettings(name="EulerAncestralDiscreteScheduler", num_inference_steps=2)
    with pytest.raises(UserError, match=r"^sampler: EulerAncestralDiscreteScheduler does not fit the model: "):
        sample(denoiser, denoiser.module, settings, [0])


def test_sampled_pixels_are_rounded_not_cut_off(pico_denoiser: DDPM, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = torch.tensor([-2.0, -1.0, -0.0001, 0.0001, 1.0, 2.0]).reshape(6, 1, 1, 1)
    monkeypatch.setattr(sampling, "sample", lambda *_, **__: levels)
    pixels = sample_pixels(pico_denoiser, pico_denoiser.module, DDIM, seed=0, count=6, batch_size=6)
    assert pixels.flatten().tolist() == [0, 0, 127, 128, 255, 255]
    assert np.array_equal(pixels, to_pixels(levels))
