"""What an expert's step costs inside the real loop: against the sum of its parts, and a plain diffusers loop.

    python benchmarks/train_step.py [RECIPE] [KEY=VALUE ...] [--steps 60] [--repeats 3] [--devices cpu,cuda]
        [--workers 0,1,2] [--jpegs 512]

A step is timed inside `decoupling.train.train`, from one call of its `combine` to the next, so it holds everything:
data, augmentation, noise, losses, clipping, optimizer, EMA and the journal. Rows: each device that is there, with and
without torch.compile, with so many loader workers. `waiting` is the share of a step in which the loop waits for its
batch; without loader workers the batch is made in that time, on the step's own core. `--jpegs N` takes a folder of
N JPEGs, decoded anew at every step, in place of the recipe's images. Medians over repeats are printed with their range.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from deme_diffusion.artefacts import Store
from deme_diffusion.config import DataSettings, Recipe, RuntimeSettings
from deme_diffusion.data.loading import Order, steps
from deme_diffusion.data.splits import Split
from deme_diffusion.decoupling import train as training
from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.memory import estimate
from deme_diffusion.decoupling.setup import make_optimizer
from deme_diffusion.decoupling.step import Job, total
from deme_diffusion.decoupling.switches import laid_out, switched
from deme_diffusion.decoupling.train import train
from deme_diffusion.errors import MachineError
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.families import family
from deme_diffusion.models.projection import Projected
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.node import Node
from deme_diffusion.pipeline.stages import Stages, job_of
from deme_diffusion.recipes import load

WARM_UP = 5
Seconds = dict[str, float]


def now(device: torch.device) -> float:
    """The time when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- the real loop ---------------------------------------------------------------------------------


def real_step(denoiser: Denoiser, split: Split, job: Job, runtime: RuntimeSettings) -> Seconds:
    """Median seconds of a step and of its waiting for the batch, and peak bytes, inside the real loop."""
    moments: list[float] = []
    waits: list[float] = []
    device = torch.device(runtime.device)

    def combine(losses: dict[int, torch.Tensor]) -> torch.Tensor:
        moments.append(time.perf_counter())  # no synchronising: a step waits for the device once, by itself
        return total(losses)

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        batches = steps(*arguments, **options)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            waits.append(time.perf_counter() - started)
            if batch is None:
                return
            yield batch

    training.steps = watched  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as folder, Peak(device) as peak:
            train(denoiser, split, job, Path(folder), runtime=runtime, combine=combine)
    finally:
        training.steps = steps
    step = statistics.median(b - a for a, b in itertools.pairwise(moments[WARM_UP:]))
    return {"step": step, "waiting": statistics.median(waits[WARM_UP:-1]), "peak": peak.grown}


class Peak:
    """Most bytes beyond those at the start: what torch allocates on a GPU, else the process's resident memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.grown, self._over = device, 0.0, threading.Event()

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.start = self._now()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.grown = max(self.grown, self._now() - self.start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- its parts, and a plain loop -------------------------------------------------------------------


def parts(denoiser: Denoiser, split: Split, job: Job, runtime: RuntimeSettings, count: int) -> Seconds:
    """Median seconds of each part of a step, timed one after the other in a step's own order.

    In turn, not each in a loop of its own: there they would find the caches warm, as they never do in a step.
    """
    settings, device = job.settings, torch.device(runtime.device)
    student = Projected(laid_out(denoiser.student().to(device), runtime), job.projection).train()
    teacher = laid_out(denoiser.module.to(device).eval(), runtime)
    parameters = list(student.parameters())
    optimizer, ema = make_optimizer(parameters, job, device), Ema(parameters, settings, offload=runtime.offload_ema)
    batch = next(steps(split, Order(settings.train_batch_size), seed=0, start=0, stop=1))[0]
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    t = torch.randint(0, denoiser.num_train_timesteps, (settings.train_batch_size,), device=device)
    noised = denoiser.noised(batch, t, batch["noise"])
    half = torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=half, enabled=settings.mixed_precision != "no")

    def student_pass() -> None:
        with autocast():
            prediction = denoiser.predict(student, noised.x_t, noised.t, {})
        nn.functional.mse_loss(prediction.float(), noised.target).backward()

    def teacher_forward() -> None:
        with torch.no_grad(), autocast():
            denoiser.predict(teacher, noised.x_t, noised.t, {})

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    work = {"student": student_pass, "teacher": teacher_forward, "optimizer": update, "EMA": ema.step}
    times: dict[str, list[float]] = {name: [] for name in work}
    with switched(runtime, allow_tf32=settings.allow_tf32):
        for _ in range(count + WARM_UP):
            for name, part in work.items():
                started = now(device)
                part()
                times[name].append(now(device) - started)
    return {name: statistics.median(each[WARM_UP:]) for name, each in times.items()}


def plain_step(denoiser: Denoiser, split: Split, job: Job, device: torch.device, count: int) -> float:
    """Median seconds of a plain diffusers step in float32: no teacher, no projection, the same batch and EMA."""
    settings, module = job.settings, denoiser.student().to(device).train()
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    images = split.images(list(range(min(len(split), settings.train_batch_size)))).to(device)

    def step() -> None:
        noise = torch.randn_like(images)
        t = torch.randint(0, denoiser.num_train_timesteps, (len(images),), device=device)
        prediction = module(denoiser.scheduler.add_noise(images, noise, t), t).sample
        nn.functional.mse_loss(prediction, noise).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)

    return timed(step, device, count)


def timed(work: Callable[[], object], device: torch.device, count: int) -> float:
    """Median seconds of one call."""
    times = []
    for _ in range(count + 1):
        started = now(device)
        work()
        times.append(now(device) - started)
    return statistics.median(times[1:])


# -- the table -------------------------------------------------------------------------------------


def measured(denoiser: Denoiser, split: Split, job: Job, runtime: RuntimeSettings, repeats: int) -> list[Seconds]:
    """Everything, so many times, in turn."""
    results = []
    for _ in range(repeats):
        each = parts(denoiser, split, job, runtime, job.steps)
        each |= {"sum": sum(each.values()), **real_step(denoiser, split, job, runtime)}
        each["plain"] = plain_step(denoiser, split, job, torch.device(runtime.device), job.steps)
        results.append(each)
    return results


def row(name: str, results: list[Seconds], batch: int, reckoned: int) -> str:
    """A row of the table."""

    def cell(value: Callable[[Seconds], float], form: str = ".1f") -> str:
        values = sorted(value(each) for each in results)
        return f"{statistics.median(values):{form}} ({values[0]:{form}} to {values[-1]:{form}})"

    cells = [
        cell(lambda r: batch / r["step"], ",.0f"),
        cell(lambda r: 1000 * r["step"]),
        cell(lambda r: r["step"] / r["sum"], ".3f"),
        cell(lambda r: 100 * r["teacher"] / r["step"]),
        cell(lambda r: 100 * r["waiting"] / r["step"]),
        f"{results[0]['peak'] / 1e6:,.0f}",
        f"{reckoned / 1e6:,.0f}",
        cell(lambda r: 1000 * r["plain"]),
    ]
    return f"| {name} | {' | '.join(cells)} |"


@contextmanager
def opened(recipe: Recipe) -> Iterator[tuple[Denoiser, Split, Job]]:
    """The base, the train split and the first expert as a run has them; images are indexed in a temporary store."""
    graph = Graph(recipe, download=True)
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(graph, Store(Path(folder)))
        if isinstance(graph.data, Node):
            stages.store.produce(graph.data.key, stages.make(graph.data))
        if isinstance(graph.base, Node):  # untrained, which takes as long
            stages.denoiser = DDPM.from_scratch(recipe.pretrain, out_seed=0)
        yield stages.denoiser, stages.splits["train"], job_of(recipe, graph.experts[recipe.seeds[0]][0])


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


def rows(recipe: Recipe, options: argparse.Namespace, denoiser: Denoiser, split: Split, job: Job) -> Iterator[str]:
    """The table's rows: devices, compiled or not, loader workers."""
    for device in options.devices.split(","):
        if device == "cuda" and not torch.cuda.is_available():
            yield "| cuda | none here |"
            continue
        workers = [int(count) for count in options.workers.split(",")] if options.workers else \
            [recipe.runtime.dataloader_num_workers]  # fmt: skip
        for compiled, count in itertools.product((False, True)[: 1 if options.no_compile else 2], workers):
            changes = {"device": device, "compile": compiled, "dataloader_num_workers": count,
                       "checkpointing_steps": 10**9, "logging_steps": 10**9}  # fmt: skip
            runtime = recipe.runtime.model_copy(update=changes)
            name = f"{device}{', compiled' * compiled}, {count} workers"
            reckoned = estimate(denoiser, job, runtime, torch.device(device))
            try:
                results = measured(denoiser, split, job, runtime, options.repeats)
            except MachineError as error:  # where torch compiles it wrongly, say
                yield f"| {name} | {error} |"
                continue
            yield row(name, results, job.settings.train_batch_size, sum(reckoned.values()) - reckoned["base"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="digits")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as decouple.train_batch_size=64")
    parser.add_argument("--steps", type=int, default=60, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--devices", default="cpu,cuda", help="those that are there are measured")
    parser.add_argument("--workers", default="", help="as 0,1,2: loader workers, a row each; else as the recipe says")
    parser.add_argument("--jpegs", type=int, default=0, metavar="N", help="N JPEGs made here, instead of its own data")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows with torch.compile")
    options = parser.parse_intermixed_args()

    recipe = load(options.recipe, options.overrides).recipe
    with tempfile.TemporaryDirectory() as folder:
        if options.jpegs:
            recipe = on_jpegs(recipe, options.jpegs, Path(folder))
        with opened(recipe) as (denoiser, split, first):
            job = replace(first, steps=options.steps)
            count = sum(p.numel() for p in denoiser.module.parameters())
            print(f"{options.recipe}: {count:,} parameters, batch {job.settings.train_batch_size}, "
                  f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
            print("| device | images/s | ms a step | / its parts | teacher % | waiting % | peak MB | reckoned MB "
                  "| ms a plain step |\n|" + " --- |" * 9)  # fmt: skip
            for line in rows(recipe, options, denoiser, split, job):
                print(line, flush=True)


if __name__ == "__main__":
    main()
