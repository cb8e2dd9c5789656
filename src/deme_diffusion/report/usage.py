"""How images are asked for of a merged model by stock diffusers, and what hubs call such a model. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deme_diffusion.config import Recipe

PLAIN = "unconditional-image-generation"
TASKS = {"nothing": PLAIN, "class": PLAIN, "text": "text-to-image"}
"""What hubs call a model by what it takes; they have no word for classes, which a tag says."""
OF_CLASSES = "class-conditional-image-generation"
PROMPT = "a photo of a dog"


def usage(recipe: Recipe, prompts: Sequence[Any] = (), *, settled: bool = True) -> dict[str, Any]:
    """What a card says of a recipe's model: its `task`, `tags`, how it is called for a sample, whether it is a LoRA.

    `settled`: called as the recipe's first sampler samples, else as the stock pipeline does.
    """
    takes = recipe.model.takes
    told: dict[str, Any] = {"task": TASKS[takes], "tags": [OF_CLASSES] if takes == "class" else []}
    if recipe.decouple.lora_rank is not None and not recipe.merge.fuse:
        told["lora"] = True
    if takes == "nothing":
        return told
    return {**told, "sample_call": sample_call(recipe, next(iter(prompts), None), settled)}


def sample_call(recipe: Recipe, prompt: str | int | None, settled: bool) -> str:
    """The call of the stock pipeline for one prompt."""
    model, sampler = recipe.model, recipe.evaluate.samplers[0]
    text = json.dumps(prompt or PROMPT, ensure_ascii=False)
    options = [f"class_labels=[{prompt or 0}]" if model.takes == "class" else text]
    if settled:
        options.append(f"num_inference_steps={sampler.num_inference_steps}")
    if settled and sampler.guidance_scale is not None:
        options.append(f"guidance_scale={sampler.guidance_scale:g}")
    if model.family == "wan":
        options.append(f"num_frames={model.num_frames}")
    return f"pipeline({', '.join(options)}).{'frames' if model.family == 'wan' else 'images'}"


def task_of(run: Mapping[str, Any]) -> str:
    """What a run's model does; one that says nothing asks for nothing."""
    return str(run.get("task") or PLAIN)
