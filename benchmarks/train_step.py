"""What an expert's step costs inside the real loop: against the sum of its parts, and a plain diffusers loop.

    python benchmarks/train_step.py [RECIPE] [KEY=VALUE ...] [--steps 60] [--repeats 3] [--devices cpu,cuda]

A step is timed inside `decoupling.train.train`, from one call of its `combine` to the next, so it holds everything:
data, augmentation, noise, losses, clipping, optimizer, EMA and the journal. Rows: each device that is there, with and
without torch.compile. `waiting` is the share of a step in which the loop waits for its batch; without loader workers
the batch is made in that time, on the step's own core. Medians over repeats are printed with their range.
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
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from deme_diffusion.config import Recipe, RuntimeSettings
from deme_diffusion.data.loading import Order, steps
from deme_diffusion.data.splits import Split, load_splits
from deme_diffusion.decoupling import train as training
from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.memory import estimate
from deme_diffusion.decoupling.setup import make_optimizer
from deme_diffusion.decoupling.step import Job, total
from deme_diffusion.decoupling.switches import laid_out, switched
from deme_diffusion.decoupling.train import train
from deme_diffusion.division import uniform
from deme_diffusion.errors import MachineError
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.families import family
from deme_diffusion.models.projection import Projected
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import Input
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


def job_of(recipe: Recipe, denoiser: Denoiser, count: int) -> Job:
    """The recipe's first expert."""
    settings = recipe.decouple
    subset = uniform(settings.num_ranges, denoiser.num_train_timesteps).subset(0)
    return Job("expert", settings, subset, count, settings.learning_rate, 0, settings.global_prob,
               settings.consistency_weight, settings.projection, teacher_dtype=settings.teacher_dtype)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="digits", help="one with a pretrained model that is here")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as decouple.train_batch_size=64")
    parser.add_argument("--steps", type=int, default=60, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--devices", default="cpu,cuda", help="those that are there are measured")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows with torch.compile")
    options = parser.parse_args()

    recipe = load(options.recipe, options.overrides).recipe
    base = Graph(recipe, download=True).base
    assert isinstance(base, Input), "a recipe with a pretrained model is expected"
    denoiser, split = family(recipe.model.family).load(base.folder), load_splits(recipe.data)["train"]
    job = job_of(recipe, denoiser, options.steps)
    batch = job.settings.train_batch_size
    count = sum(p.numel() for p in denoiser.module.parameters())
    print(f"{options.recipe}: {count:,} parameters, batch {batch}, {torch.get_num_threads()} threads, "
          f"{recipe.runtime.dataloader_num_workers} loader workers, torch {torch.__version__}")  # fmt: skip
    print("| device | images/s | ms a step | / its parts | teacher % | waiting % | peak MB | reckoned MB "
          "| ms a plain step |\n|" + " --- |" * 9)  # fmt: skip
    for device in options.devices.split(","):
        if device == "cuda" and not torch.cuda.is_available():
            print("| cuda | none here |")
            continue
        for compiled in (False, True)[: 1 if options.no_compile else 2]:
            changes = {"device": device, "compile": compiled, "checkpointing_steps": 10**9, "logging_steps": 10**9}
            runtime = recipe.runtime.model_copy(update=changes)
            name = f"{device}{', compiled' * compiled}"
            reckoned = estimate(denoiser, job, runtime, torch.device(device))
            try:
                results = measured(denoiser, split, job, runtime, options.repeats)
            except MachineError as error:  # where torch compiles it wrongly, say
                print(f"| {name} | {error} |")
                continue
            print(row(name, results, batch, sum(reckoned.values()) - reckoned["base"]), flush=True)


if __name__ == "__main__":
    main()
