"""What would stop a run only after hours of training, found before the first: settings, the extractor, labels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from deme_diffusion.config import DataSettings, Recipe, TrainSettings
from deme_diffusion.data.encoding import say_cut
from deme_diffusion.data.sources import Pixels
from deme_diffusion.data.splits import Split, to_pixels
from deme_diffusion.decoupling.switches import check_compiler
from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.evaluation.clip.score import load_clip
from deme_diffusion.evaluation.extractors import Extractor, Kind, load_extractor
from deme_diffusion.evaluation.extractors.classifier import check_stages
from deme_diffusion.merging.selection import MergeWeights
from deme_diffusion.merging.write import shard_bytes
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.denoiser import Prompt
from deme_diffusion.models.devices import device_of
from deme_diffusion.models.latent import LatentDenoiser
from deme_diffusion.models.lora import layers_for, peft_parts
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.workbench import Workbench

SECTIONS = ("pretrain", "decouple")
"""Stages that train, and the sections of the recipe that they train by."""
Problem = tuple[str, UserError | MachineError]
"""The setting that it is about, and what is wrong."""


def check(bench: Workbench, nodes: Sequence[Node]) -> None:
    """Before the first training among the stages that are left to do, the images being indexed.

    Raises UserError (MachineError where the machine lacks a compiler) for settings that this machine or the base cannot
    follow, an extractor that does not take the images, and labels that a classifier would lack.
    """
    recipe, extractor = bench.recipe, bench.graph.extractor
    for _, error in settings_problems(recipe, [name for name in SECTIONS if any(n.stage == name for n in nodes)]):
        raise error
    if any(node.stage == "merge" for node in nodes):
        check_patterns(bench)
    if recipe.model.latent:
        check_asked(bench)
        if recipe.model.takes == "text" and bench.graph.cache is None and any(n.stage == "decouple" for n in nodes):
            say_cut(bench.denoiser, bench.splits)  # type: ignore[arg-type]
    if recipe.decouple.lora_rank is not None and any(node.stage == "decouple" for node in nodes):
        peft_parts()
        check_targets(bench)
    train = bench.splits["train"]
    if isinstance(bench.graph.clip, Input) and any(node.stage == "clip_score" for node in nodes):
        load_clip(bench.graph.clip.folder)
    if isinstance(extractor, Input):
        if any(extractor in node.parents.values() for node in nodes):
            try_extractor(extractor.folder, recipe.extractor.kind, to_pixels(train.images([0])))
    elif extractor in nodes:
        check_stages(recipe.extractor, *train.shape[1:])
        check_labels(list(bench.splits.values()), recipe.data)


def check_patterns(bench: Workbench) -> None:
    """Raises UserError for a pattern of `merge` that matches no parameter of the base, or shards of no size."""
    merge, base = bench.recipe.merge, bench.graph.base
    if merge.max_shard_size is not None:
        shard_bytes(merge.max_shard_size)
    if not (merge.weights_for or merge.keep):
        return
    made = isinstance(base, Input) or bench.store.find(base.key) is not None
    module = bench.denoiser.module if made else DDPM.from_scratch(bench.recipe.pretrain, out_seed=0).module
    experts = bench.recipe.decouple.num_ranges
    weights = MergeWeights((0.0,) * experts, merge.weights_for, merge.keep)
    weights.check(list(module.state_dict()), experts)


def check_asked(bench: Workbench) -> None:
    """Raises UserError for a size or a guidance that the stock pipeline of a latent family does not sample with."""
    denoiser, recipe = bench.denoiser, bench.recipe
    assert isinstance(denoiser, LatentDenoiser), "checked by the settings"
    prompt: Prompt = 0 if denoiser.takes == "class" else ""
    for sampler in (*recipe.evaluate.samplers, recipe.merge.sampler):
        denoiser.asked([prompt], sampler.guidance_scale)


def check_targets(bench: Workbench) -> None:
    """Raises UserError for layers that a LoRA is to adapt and the base does not have."""
    base = bench.graph.base
    made = isinstance(base, Input) or bench.store.find(base.key) is not None
    if made:
        layers_for(bench.denoiser.module, bench.recipe.decouple.lora_targets)


def settings_problems(recipe: Recipe, sections: Sequence[str]) -> Iterator[Problem]:
    """What this machine cannot follow in `runtime`, and in the sections that something is trained by."""
    try:
        device = device_of(recipe.runtime.device)
    except UserError as error:  # all that follows depends on it
        yield "runtime.device", error
        return
    for name in sections:
        yield from _training_problems(name, getattr(recipe, name), device)
    if recipe.runtime.compile:
        try:
            check_compiler(device)
        except MachineError as error:
            yield "runtime.compile", error


def _training_problems(section: str, settings: TrainSettings, device: torch.device) -> Iterator[Problem]:
    on_gpu, key = device.type == "cuda", f"{section}.mixed_precision"
    if settings.mixed_precision == "fp16" and not on_gpu:
        yield key, UserError(f"{key}: fp16 needs a GPU, and this runs on the {device.type}; use bf16 or no")
    if settings.mixed_precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        yield key, UserError(f"{key}: this GPU has no bf16; use fp16 or no")
    key = f"{section}.use_8bit_adam"
    if settings.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        yield key, UserError(f"{key}: needs bitsandbytes: pip install 'deme-diffusion[8bit]', or set it to false")
    elif settings.use_8bit_adam and not on_gpu:
        yield key, UserError(f"{key}: needs a GPU, and this runs on the {device.type}; set it to false")


def try_extractor(path: Path, kind: Kind, pixels: Pixels) -> Extractor:
    """The extractor, on the CPU, that has answered to images (n, h, w, c). Raises UserError where it cannot."""
    extractor = load_extractor(path, kind)
    try:
        extractor(pixels)
    except UserError:
        raise
    except Exception as error:  # whatever a network makes of a shape that is not its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        height, width, channels = pixels.shape[1:]
        said = f"{path} cannot take images of {width}x{height} with {channels} channels ({reason[:120]})"
        raise UserError(f"extractor: {said}") from None
    return extractor


def check_labels(splits: Sequence[Split], settings: DataSettings) -> None:
    """Raises UserError where images that a classifier is to learn have no label."""
    labels = [split.source.label(i) for split in splits for i in split.indices]
    if problem := unlabelled(labels.count(None), len(labels), settings):
        raise UserError(problem)


def unlabelled(missing: int, images: int, settings: DataSettings) -> str | None:
    """What to say of images without labels where a classifier is to learn them; None where all have one."""
    if not missing:
        return None
    counted = "the images have no labels" if missing == images else f"{missing:,} of {images:,} images have no label"
    where = settings.path or settings.source
    remedy = "name data.label_column, complete them, or use extractor.kind=inception"
    return f"data: {where}: {counted}, and the extractor is a classifier that learns them; {remedy}"
