"""What the page is told: plain values, images as PNG in base64."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from deme_diffusion.config import SamplerSettings
from deme_diffusion.division import names_of
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.export import Pixels, png
from deme_diffusion.files import canonical_digest
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.playground import ready
from deme_diffusion.playground.asking import LARGEST_SEED, MOST_IMAGES, MOST_WEIGHT, AskedSamples
from deme_diffusion.playground.commands import measuring
from deme_diffusion.playground.session import LOSS_IMAGES, Session
from deme_diffusion.playground.worker import Ticket
from deme_diffusion.report.figures import COLOURS

CONTRAST = 4
"""By which the differences of images are enlarged, around grey; the page says so."""
MOST_BYTES = 1 << 24
"""Of the pixels in an answer: three grids."""


def most_images(session: Session) -> int:
    """How many images a page may ask for at once."""
    return max(1, min(MOST_IMAGES, MOST_BYTES // (3 * prod(session.stages.denoiser.image_shape))))


def facts(session: Session, images: int) -> dict[str, Any]:
    """What the page is built from."""
    recipe, how = session.recipe, session.how
    low, high = recipe.merge.bounds or ready.BOUNDS
    shown = [0.0, *(value for preset in session.presets for value in preset.values)]
    samplers, most = ready.samplers(session.graph), most_images(session)
    return {
        "name": recipe.name,
        "folder": str(session.run.folder.absolute()),
        "base": session.graph.base.label,
        "method": how.what,
        "weighted": how.method.weighted,
        "linear": how.method.name == "task_arithmetic",
        "timesteps": session.graph.division.num_timesteps,
        "experts": ready.experts(session.graph, COLOURS),
        "bounds": [min(low, *shown), max(high, *shown)],
        "presets": [vars(preset) for preset in session.presets],
        "start": max((i for i, preset in enumerate(session.presets) if preset.name in ("uniform", "merged"))),
        "samplers": [{"label": label, "steps": one.num_inference_steps} for label, one in samplers.items()],
        "listed": len(recipe.evaluate.samplers),
        "images": min(images, most),
        "most": {"images": most, "weight": MOST_WEIGHT, "seed": LARGEST_SEED - MOST_IMAGES},
        "ranges": names_of(session.graph.loss_ranges),
        "loss_images": LOSS_IMAGES,
        "notes": notes(session),
    }


def notes(session: Session) -> list[str]:
    """What a reader must know before he moves a slider."""
    how, said = session.how, []
    if not how.method.weighted:
        said.append(f"Method {how.method.name} takes no weights: there is one merged model. Open the run with "
                    "merge.method=task_arithmetic merge.search=none to weigh its experts.")  # fmt: skip
    if len(session.recipe.seeds) > 1:
        said.append(f"The experts are those of {session.training}.")
    if how.fixed:
        said.append("The recipe says what some parameters are (merge.weights_for, merge.keep), whatever the sliders: "
                    "at w = 0 the merged model is not the base.")  # fmt: skip
    if session.merger.unfolded_places:
        places = ", ".join(session.merger.unfolded_places)
        said.append(f"The projections after {places} fold into no weight: they act here, and a saved model has them "
                    "beside its weights, which stock diffusers loads without them.")  # fmt: skip
    return said


@dataclass(frozen=True)
class Wanted:
    """What is sampled, checked; `key` names the base's images."""

    sampler: SamplerSettings
    seeds: Sequence[int]
    weights: MergeWeights
    key: str
    known: str


def wanted(session: Session, asked: AskedSamples) -> Wanted:
    """The samples that a page asks for. Raises UserError for what there is not, or more than an answer holds."""
    sampler = ready.sampler_of(session.graph, asked.sampler, asked.steps)
    if asked.images > (most := most_images(session)):
        raise UserError(f"images: {asked.images}; at most {most} of this size at once")
    settings = sampler.model_dump(mode="json")
    key = canonical_digest([session.graph.base.digest, settings, asked.seed, asked.images])[:16]
    seeds = range(asked.seed, asked.seed + asked.images)
    return Wanted(sampler, seeds, session.weights(asked.weights, asked.by_layer), key, asked.known)


def samples(session: Session, asked: Wanted, ticket: Ticket) -> dict[str, Any]:
    """Images of the base, unless the page shows them already, and of the merged model; times, and what changed."""
    before, _ = session.sample(None, asked.sampler, asked.seeds, ticket)
    merged = session.merge(asked.weights, ticket)
    after, seconds = session.sample(asked.weights, asked.sampler, asked.seeds, ticket)
    changes = after.astype(np.int16) - before.astype(np.int16)
    return {
        "key": asked.key,
        "base": None if asked.known == asked.key else coded(before),
        "merged": coded(after),
        "changes": coded((128 + CONTRAST * changes).clip(0, 255).astype(np.uint8)),
        "height": before.shape[1],
        "width": before.shape[2],
        "merge_seconds": merged.seconds,
        "sample_seconds": seconds,
        "change": merged.change,
        "difference": float(np.abs(changes).mean()),
        "sampler": asked.sampler.label,
        "prompts": prompts(session, asked.seeds),
        "command": command(session, asked.weights),
    }


def prompts(session: Session, seeds: Sequence[int]) -> list[str]:
    """What each image was asked for by, in words; nothing where the model takes nothing."""
    asked = session.stages.asked_at(seeds) or ()
    return [f"class {prompt}" if isinstance(prompt, int) else f"“{prompt or ''}”" for prompt in asked]


def packed(told: dict[str, Any]) -> bytes:
    """An answer as JSON."""
    return json.dumps(told, allow_nan=False).encode()


def coded(images: Pixels) -> list[str]:
    """Each image as a PNG in base64, every pixel as it is."""
    return [base64.b64encode(png(image)).decode() for image in images]


def command(session: Session, weights: MergeWeights) -> str:
    """How to measure the model of these weights; '' where the method takes none."""
    if not session.how.method.weighted:
        return ""
    return measuring(session.words, session.run.folder, session.recipe.merge, weights, session.how.rules)
