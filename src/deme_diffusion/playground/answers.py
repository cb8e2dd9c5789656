"""What the page is told: plain values, images as PNG in base64."""

from __future__ import annotations

import base64
import json
import shlex
from typing import Any

import numpy as np

from deme_diffusion.division import names_of
from deme_diffusion.evaluation.export import Pixels, png
from deme_diffusion.files import canonical_digest
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.playground import ready
from deme_diffusion.playground.asking import LARGEST_SEED, MOST_IMAGES, MOST_WEIGHT, AskedSamples
from deme_diffusion.playground.session import LOSS_IMAGES, Session
from deme_diffusion.playground.worker import Ticket
from deme_diffusion.report.figures import COLOURS

CONTRAST = 4
"""By which the differences of images are enlarged, around grey; the page says so."""


def facts(session: Session, images: int) -> dict[str, Any]:
    """What the page is built from."""
    recipe, how = session.recipe, session.how
    bounds = recipe.merge.bounds or ready.BOUNDS
    samplers = ready.samplers(session.graph)
    return {
        "name": recipe.name,
        "folder": str(session.run.folder),
        "base": session.graph.base.label,
        "method": how.what,
        "weighted": how.method.weighted,
        "linear": how.method.name == "task_arithmetic",
        "timesteps": session.graph.division.num_timesteps,
        "experts": ready.experts(session.graph, COLOURS),
        "bounds": list(bounds),
        "presets": [vars(preset) for preset in session.presets],
        "start": max((i for i, preset in enumerate(session.presets) if preset.name in ("uniform", "merged"))),
        "samplers": [{"label": label, "steps": one.num_inference_steps} for label, one in samplers.items()],
        "listed": len(recipe.evaluate.samplers),
        "images": images,
        "most": {"images": MOST_IMAGES, "weight": MOST_WEIGHT, "seed": LARGEST_SEED - MOST_IMAGES},
        "ranges": names_of(session.graph.loss_ranges),
        "loss_images": LOSS_IMAGES,
        "notes": notes(session),
    }


def notes(session: Session) -> list[str]:
    """What a reader must know before he moves a slider."""
    how, said = session.how, []
    if not how.method.weighted:
        said.append(f"Method {how.method.name} takes no weights: the sliders do nothing. Open the run with "
                    "merge.method=task_arithmetic merge.search=none to weigh its experts.")  # fmt: skip
    if how.fixed:
        said.append("The recipe says what some parameters are (merge.weights_for, merge.keep), whatever the sliders: "
                    "at w = 0 the merged model is not the base.")  # fmt: skip
    if session.merger.unfolded_places:
        places = ", ".join(session.merger.unfolded_places)
        said.append(f"The projections after {places} fold into no weight: they act here, and a saved model has them "
                    "beside its weights, which stock diffusers loads without them.")  # fmt: skip
    return said


def samples(session: Session, asked: AskedSamples, ticket: Ticket) -> dict[str, Any]:
    """Images of the base, unless the page shows them already, and of the merged model; times, and what changed."""
    sampler = ready.sampler_of(session.graph, asked.sampler, asked.steps)
    weights = session.weights(asked.weights, asked.by_layer)
    seeds = list(range(asked.seed, asked.seed + asked.images))
    before, _ = session.sample(None, sampler, seeds, ticket)
    merged = session.merge(weights, ticket)
    after, seconds = session.sample(weights, sampler, seeds, ticket)
    changes = after.astype(np.int16) - before.astype(np.int16)
    key = canonical_digest([sampler.model_dump(mode="json"), seeds[0], len(seeds)])[:16]
    return {
        "key": key,
        "base": None if asked.known == key else coded(before),
        "merged": coded(after),
        "changes": coded((128 + CONTRAST * changes).clip(0, 255).astype(np.uint8)),
        "height": before.shape[1],
        "width": before.shape[2],
        "merge_seconds": merged.seconds,
        "sample_seconds": seconds,
        "change": merged.change,
        "difference": float(np.abs(changes).mean()),
        "sampler": sampler.label,
        "command": command(session, weights),
    }


def coded(images: Pixels) -> list[str]:
    """Each image as a PNG in base64, every pixel as it is."""
    return [base64.b64encode(png(image)).decode() for image in images]


def command(session: Session, weights: MergeWeights) -> str:
    """How to measure the model of these weights as a run of its own, which shares base and experts."""
    merge = session.recipe.merge
    if not session.how.method.weighted:
        return ""
    settings = ["merge.search=none", f"merge.weights=[{', '.join(f'{w:.6g}' for w in weights.values)}]"]
    settings += ["merge.method=task_arithmetic"] if merge.method == "none" else []
    settings += ["merge.weighting=uniform"] if merge.weighting != "uniform" else []
    if weights.rules != session.how.rules:  # a search's, by layer
        settings.append(f"merge.weights_for={json.dumps({key: list(row) for key, row in weights.rules.items()})}")
    return shlex.join([*session.words, *settings, "--out", f"{session.run.folder}-played"])
