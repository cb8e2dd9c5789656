"""What an expert's step costs inside the real loop: against the sum of its parts, and a plain diffusers loop.

    python benchmarks/train_step.py [RECIPE] [KEY=VALUE ...] [--steps 60] [--repeats 3] [--devices cpu,cuda]
        [--workers 0,1,2] [--jpegs 512]
    python benchmarks/train_step.py --families all [--lora 4] [--batch 8]
    python benchmarks/train_step.py --architecture sd1 --resolution 512 --dtype bf16 [--lora 32] [--batch 4]
        [--checkpointing] [--teacher-dtype bfloat16]

A step is timed inside `decoupling.train.train`, from one call of its `combine` to the next, so it holds everything:
data, augmentation, noise, losses, clipping, optimizer, EMA and the journal. Rows: each device that is there, with and
without torch.compile, with so many loader workers. `waiting` is the share of a step in which the loop waits for its
batch; without loader workers the batch is made in that time, on the step's own core. `--jpegs N` takes a folder of
N JPEGs, decoded anew at every step, in place of the recipe's images. Medians over repeats are printed with their range.

`--families` takes the tiny models of the tests (`all`, or names as stable_diffusion,flux), all weights and, with
`--lora R`, adapters of rank R as well, on latents and embeddings as from a cache. `--architecture` takes a real size
with random weights, latents and embeddings, whole or, with `--lora R`, by adapters alone: on a GPU, or on a CPU where
`--devices cpu` asks for it. Peak memory is beyond the base, which a line above the table tells.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import architectures
from deme_diffusion.artefacts import Store
from deme_diffusion.config import DataSettings, Recipe, RuntimeSettings
from deme_diffusion.data.loading import Trained
from deme_diffusion.decoupling.memory import estimate, size_of
from deme_diffusion.decoupling.step import Job
from deme_diffusion.errors import MachineError
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.families import FAMILIES, family
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.stages import Stages, job_of
from deme_diffusion.recipes import load
from step_times import WARM_UP, measured, row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD = (
    "| device | images/s | ms a step | / its parts | teacher % | waiting % | peak MB | reckoned MB "
    "| ms a plain step |\n|" + " --- |" * 9
)


@contextmanager
def opened(recipe: Recipe) -> Iterator[tuple[Denoiser, Trained, Job]]:
    """The base, the train split and the first expert as a run has them; images are indexed in a temporary store."""
    graph = Graph(recipe, download=True)
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(graph, Store(Path(folder)))
        if isinstance(graph.data, Node):
            stages.store.produce(graph.data.key, stages.make(graph.data))
        if isinstance(graph.base, Node):  # untrained, which takes as long
            stages.denoiser = DDPM.from_scratch(recipe.pretrain, out_seed=0)
        yield stages.denoiser, stages.encoded["train"], job_of(recipe, graph.experts[recipe.seeds[0]][0])


def on_jpegs(recipe: Recipe, count: int, folder: Path) -> Recipe:
    """The recipe on a folder of JPEGs of 96 x 96, decoded and resized to the base's size at every step."""
    draw = np.random.default_rng(0)
    for i in range(count):  # smooth, as photographs are: noise takes longer to decode
        coarse = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{i:05}.jpg", quality=90)
    channels, height, width = opened_shape(recipe)
    assert height == width, "a base for square images is expected"
    mode = {1: "L", 3: "RGB"}[channels]
    data = DataSettings(source="folder", path=str(folder), mode=mode, resolution=height)
    extractor = recipe.extractor.model_copy(update={"pretrained": None})
    runtime = recipe.runtime.model_copy(update={"cache_images_gb": 0.0})
    return recipe.model_copy(update={"data": data, "extractor": extractor, "runtime": runtime})


def opened_shape(recipe: Recipe) -> tuple[int, ...]:
    """(c, h, w) of the base."""
    base = Graph(recipe, download=True).base
    if isinstance(base, Node):
        return DDPM.from_scratch(recipe.pretrain, out_seed=0).sample_shape
    return family(recipe.model.family).load(base.folder).sample_shape


def rows(
    runtime: RuntimeSettings,
    options: argparse.Namespace,
    denoiser: Denoiser,
    images: Trained,
    job: Job,
    label: str = "",
) -> Iterator[str]:
    """The table's rows: devices, compiled or not, loader workers."""
    for device in options.devices.split(","):
        if device == "cuda" and not torch.cuda.is_available():
            yield "| cuda | none here |"
            continue
        workers = [int(count) for count in options.workers.split(",")] if options.workers else \
            [runtime.dataloader_num_workers]  # fmt: skip
        for compiled, count in itertools.product((False, True)[: 1 if options.no_compile else 2], workers):
            changes = {"device": device, "compile": compiled, "dataloader_num_workers": count,
                       "checkpointing_steps": 10**9, "logging_steps": 10**9}  # fmt: skip
            own = runtime.model_copy(update=changes)
            name = f"{label}{device}{', compiled' * compiled}, {count} workers"
            try:
                reckoned = estimate(denoiser, job, own, torch.device(device))
                results = measured(denoiser, images, job, own, options.repeats)
            except MachineError as error:  # where torch compiles it wrongly, say
                yield f"| {name} | {error} |"
                continue
            yield row(name, results, job.settings.train_batch_size, sum(reckoned.values()) - reckoned["base"])


def of_recipe(options: argparse.Namespace) -> None:
    """The table of a recipe's first expert."""
    recipe = load(options.recipe, options.overrides).recipe
    with tempfile.TemporaryDirectory() as folder:
        if options.jpegs:
            recipe = on_jpegs(recipe, options.jpegs, Path(folder))
        with opened(recipe) as (denoiser, images, first):
            told(options.recipe, denoiser, first)
            print(HEAD)
            for line in rows(recipe.runtime, options, denoiser, images, replace(first, steps=options.steps)):
                print(line, flush=True)


def of_families(options: argparse.Namespace) -> None:
    """The table of the tiny models, each whole and, where a rank is given, as LoRA."""
    names = [name for name in FAMILIES if name != "ddpm"]
    names = names if options.families == "all" else options.families.split(",")
    dtype, runtime = DTYPES[options.dtype], RuntimeSettings(gradient_checkpointing=options.checkpointing)
    print(HEAD)
    for name, rank in itertools.product(names, (None, options.lora) if options.lora else (None,)):
        denoiser, images = architectures.tiny(name, dtype)
        job = architectures.job(denoiser, steps=options.steps, batch=options.batch, dtype=dtype, rank=rank)
        label = f"{name}{f', LoRA {rank}' if rank else ''}, "
        for line in rows(runtime, options, denoiser, images, of_teacher(job, options), label):
            print(line, flush=True)


def of_architecture(options: argparse.Namespace) -> None:
    """The table of a real size with random weights."""
    dtype, runtime = DTYPES[options.dtype], RuntimeSettings(gradient_checkpointing=options.checkpointing)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        denoiser, images = architectures.random_weights(options.architecture, options.resolution, dtype, place)
        made = architectures.job(denoiser, steps=options.steps, batch=options.batch, dtype=dtype, rank=options.lora)
        job = of_teacher(made, options)
        told(f"{options.architecture} at {options.resolution} px, {options.dtype}", denoiser, job)
        print(HEAD)
        for line in rows(runtime, options, denoiser, images, job):
            print(line, flush=True)


def of_teacher(job: Job, options: argparse.Namespace) -> Job:
    """The job with the teacher in the precision that was asked for; of LoRA it is the base, as that is."""
    return job if job.lora else replace(job, teacher_dtype=options.teacher_dtype)


def told(name: str, denoiser: Denoiser, job: Job) -> None:
    """A line about what is timed."""
    count = sum(p.numel() for p in denoiser.module.parameters())
    how = f"LoRA {job.lora.rank}" if job.lora else "all weights"
    print(f"{name}: {count:,} parameters ({size_of(denoiser.module) / 1e6:,.0f} MB), {how}, batch "
          f"{job.settings.train_batch_size}, {torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="digits")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as decouple.train_batch_size=64")
    parser.add_argument("--steps", type=int, default=60, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--devices", help="those that are there are measured; else cpu,cuda")
    parser.add_argument("--workers", default="", help="as 0,1,2: loader workers, a row each; else as the recipe says")
    parser.add_argument("--jpegs", type=int, default=0, metavar="N", help="N JPEGs made here, instead of its own data")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows with torch.compile")
    parser.add_argument("--families", metavar="NAMES", help="tiny models of families: all, or as flux,wan")
    parser.add_argument("--architecture", choices=architectures.ARCHITECTURES, help="a real size with random weights")
    parser.add_argument("--resolution", type=int, default=512, help="of --architecture, in pixels")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="in which the base is held and a step computes")
    parser.add_argument("--teacher-dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="float32: as the base is held")  # fmt: skip
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lora", type=int, metavar="R", help="adapters of rank R")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    options = parser.parse_intermixed_args()
    if options.steps < 2 + WARM_UP:
        parser.error(f"--steps {options.steps}: {WARM_UP} of them warm up; {2 + WARM_UP} or more")
    if options.architecture and not torch.cuda.is_available() and options.devices is None:
        sys.exit(f"--architecture {options.architecture}: no GPU here, and a step takes minutes on a CPU; "
                 "--devices cpu times it all the same")  # fmt: skip
    options.devices = options.devices or ("cuda" if options.architecture else "cpu,cuda")
    (of_architecture if options.architecture else of_families if options.families else of_recipe)(options)


if __name__ == "__main__":
    main()
