"""Rows of the parts table: how images are drawn from the models when they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deme_diffusion.ablate.rows import Change, Numeric, Part, Replacement, Variant
from deme_diffusion.ablate.table_division import whole
from deme_diffusion.ablate.text import Number
from deme_diffusion.config import Recipe
from deme_diffusion.evaluation.samplers import parameters

_SAMPLERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "DDIMScheduler": ("DDIM", ("ddim",)),
    "DDPMScheduler": ("DDPM", ("ddpm",)),
    "PNDMScheduler": ("PNDM", ("pndm", "plms")),
    "DPMSolverMultistepScheduler": ("DPM-Solver++", ("dpm-solver",)),
    "DPMSolverSinglestepScheduler": ("DPM-Solver++ single step", ("singlestep", "dpm-solver singlestep")),
    "EulerDiscreteScheduler": ("Euler", ("euler",)),
    "EulerAncestralDiscreteScheduler": ("Euler ancestral", ("euler ancestral sampler",)),
    "HeunDiscreteScheduler": ("Heun", ("heun",)),
    "UniPCMultistepScheduler": ("UniPC", ("unipc",)),
    "LMSDiscreteScheduler": ("LMS", ("lms",)),
    "DEISMultistepScheduler": ("DEIS", ("deis",)),
    "KDPM2DiscreteScheduler": ("KDPM2", ("kdpm",)),
}


def first_sampler(recipe: Recipe, **first: Any) -> Change:
    """The recipe's samplers with the first one changed: the others stay at their places."""
    values = [sampler.model_dump(mode="json") for sampler in recipe.evaluate.samplers]
    values[0] |= first
    return {"evaluate.samplers": values}


def _named(name: str) -> Any:
    def change(recipe: Recipe, text: str, numbers: Sequence[Number]) -> list[Variant]:
        settings: dict[str, Any] = {"name": name}
        if "eta" not in parameters(name, "step"):
            settings["eta"] = 0.0
        if "timestep_spacing" not in parameters(name, "__init__"):
            settings["timestep_spacing"] = None
        etas = [n.value for n in numbers if n.symbol == "eta"]
        counts = [n for n in numbers if n.symbol != "eta" and n.value >= 1]
        if etas:
            settings["eta"] = etas[0]
        if not counts:
            return [("", first_sampler(recipe, **settings))]
        label = name.removesuffix("Scheduler")
        several = len(counts) > 1
        return [
            (
                f"{label}-{n.value:g}" if several else "",
                first_sampler(recipe, **settings, num_inference_steps=whole(n, "steps")),
            )
            for n in counts
        ]

    return change


def _steps(recipe: Recipe, number: Number) -> Change:
    steps = number.of(recipe.evaluate.samplers[0].num_inference_steps)
    return first_sampler(recipe, num_inference_steps=whole(Number(float(round(steps))), "steps"))


SAMPLER = Part(
    name="sampler",
    description="the diffusers scheduler that draws the measured images (the first of the recipe's two)",
    path="evaluate.samplers",
    synonyms=("sampler", "ddim", "ddpm sampler", "ddim sampler", "dpm-solver", "ddim sampling", "ode solver"),
    actions=("REPLACE",),
    replacements=tuple(
        Replacement(name, synonyms, _named(key), example=f"{name} with 7 steps")
        for key, (name, synonyms) in _SAMPLERS.items()
    ),
    also=("sampling steps",),
)
STEPS = Part(
    name="sampling steps",
    description="steps of the recipe's first sampler",
    path="evaluate.samplers",
    synonyms=(
        "sampling steps",
        "inference steps",
        "NFE",
        "number of sampling steps",
        "ddim steps",
        "sampler steps number",
        "number of denoising steps at sampling",
    ),
    actions=("REPLACE",),
    numeric=Numeric(
        _steps,
        ("steps", "nfe", "to"),
        ("step", "nfe", "ddim", "sampl", "infer", "denois", "the", "function"),
        ("10, 50, 100", "half"),
        "7 steps",
    ),
    also=("sampler",),
)
PARTS = (SAMPLER, STEPS)
