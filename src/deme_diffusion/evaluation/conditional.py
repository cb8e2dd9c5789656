"""Images that are asked for by a prompt: the stock pipeline's own sampling, with a model of ours as its component."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deme_diffusion.config import SamplerSettings
from deme_diffusion.errors import UserError
from deme_diffusion.models.denoiser import Denoiser, Prompt
from deme_diffusion.models.latent import LatentDenoiser

Seen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Looks at one step of a sampler: t (), what the model gets at t, and what it predicts (both (b, ...)), guided."""


def unseen(t: torch.Tensor, x_t: torch.Tensor, prediction: torch.Tensor) -> None:
    """Looks at nothing."""


@contextmanager
def refusals(settings: SamplerSettings) -> Iterator[None]:
    """A schedule or prediction type that a sampler of diffusers does not know, in one line."""
    try:
        yield
    except UserError:
        raise
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"sampler: {settings.name} does not fit the model: {' '.join(str(error).split())}") from None


def generated(
    denoiser: Denoiser,
    module: nn.Module,
    settings: SamplerSettings,
    scheduler: Any,
    generators: list[torch.Generator],
    prompts: Sequence[Prompt] | None,
    seen: Seen,
) -> torch.Tensor:
    """(b, c, h, w) in [-1, 1], an image for each generator and prompt; without prompts, for none."""
    assert isinstance(denoiser, LatentDenoiser), "what takes prompts denoises latents"
    asked: list[Prompt] = [None] * len(generators) if prompts is None else list(prompts)
    assert len(asked) == len(generators), "a prompt an image"
    _told(scheduler, settings, generators, seen)
    with refusals(settings):
        return denoiser.generate(
            module,
            scheduler,
            asked,
            generators=generators,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )


def _told(scheduler: Any, settings: SamplerSettings, generators: list[torch.Generator], seen: Seen) -> None:
    """Let a fresh scheduler tell of its steps, with eta and the images' own generators wherever it takes them.

    Not all pipelines hand these on: DiT's would draw ancestral noise from the global generator.
    """
    step, scale, count = scheduler.step, getattr(scheduler, "scale_model_input", None), len(generators)
    accepted, scaled = inspect.signature(step).parameters, list[torch.Tensor]()

    @functools.wraps(step)
    def stepping(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        x_t = scaled[0] if scaled else sample  # flow matching scales nothing
        seen(torch.as_tensor(timestep), x_t[:count], model_output[:count])
        if "eta" in accepted:
            kwargs["eta"] = settings.eta
        if "generator" in accepted and kwargs.get("generator") is None:
            kwargs["generator"] = generators * (len(sample) // count)  # DiT's steps both halves of its guidance
        try:
            return step(model_output, timestep, sample, *args, **kwargs)
        except IndexError:  # a schedule with an offset, which pipelines of Stable Diffusion set, begins beyond T
            steps = settings.num_inference_steps
            raise UserError(
                f"sampler: {steps} steps of {settings.name} begin beyond the model's timesteps; take fewer"
            ) from None

    scheduler.step = stepping
    if scale is not None:

        @functools.wraps(scale)
        def scaling(*args: Any, **kwargs: Any) -> Any:
            scaled[:] = [scale(*args, **kwargs)]
            return scaled[0]

        scheduler.scale_model_input = scaling
