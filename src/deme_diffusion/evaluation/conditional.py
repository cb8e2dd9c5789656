"""Images that are asked for by a prompt: the stock pipeline's own sampling, with a model of ours as its component."""

from __future__ import annotations

import functools
import inspect
import traceback
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
    """In one line a schedule or prediction type that a sampler of diffusers does not know, and what the stock pipeline
    refuses; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except (NotImplementedError, ValueError) as error:
        told = " ".join(str(error).split())
        if _of_schedulers(error):
            raise UserError(f"sampler: {settings.name} does not fit the model: {told}") from None
        if _modules(error)[-1].startswith("diffusers.pipelines."):
            raise UserError(f"the stock pipeline refuses what it is asked for: {told}") from None
        raise


def _of_schedulers(error: BaseException) -> bool:
    """Whether a scheduler raised it, or a pipeline on setting its timesteps."""
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "retrieve_timesteps" in names or any(m.startswith("diffusers.schedulers.") for m in _modules(error))


def _modules(error: BaseException) -> list[str]:
    """Where an error passed, to where it was raised."""
    return [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]


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
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = stepping
    if scale is not None:

        @functools.wraps(scale)
        def scaling(*args: Any, **kwargs: Any) -> Any:
            scaled[:] = [scale(*args, **kwargs)]
            return scaled[0]

        scheduler.scale_model_input = scaling
