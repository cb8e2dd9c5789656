"""One expert step against the sum of its parts, and against a plain diffusers training loop, in one process.

    python benchmarks/train_step.py [--recipe digits] [--steps 60] [--repeats 5]

The step is timed inside the real loop (`decoupling.train.train`), from one call of its `combine` to the next, so it
holds everything: data, augmentation, noise, losses, clipping, optimizer, EMA and the journal. Parts and steps are
timed in turn, and medians over repeats are printed with their range.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from deme_diffusion.data.loading import Order, steps
from deme_diffusion.data.splits import load_splits
from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.step import Job, total
from deme_diffusion.decoupling.train import train
from deme_diffusion.division import uniform
from deme_diffusion.models.families import family
from deme_diffusion.models.projection import Projected
from deme_diffusion.pipeline.graph import Graph
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.recipes import load

Seconds = list[float]


def timed(work: Callable[[], object], count: int) -> float:
    """Median seconds of one call."""
    work()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def real_step(denoiser, split, job: Job, recipe) -> float:
    """Median seconds of a step inside the real loop."""
    moments: Seconds = []

    def combine(losses):
        moments.append(time.perf_counter())
        return total(losses)

    with tempfile.TemporaryDirectory() as folder:
        runtime = recipe.runtime.model_copy(update={"checkpointing_steps": 10**9, "logging_steps": 10**9})
        train(denoiser, split, job, Path(folder), runtime=runtime, combine=combine)
    differences = [b - a for a, b in itertools.pairwise(moments[5:])]
    return statistics.median(differences)


def parts(denoiser, split, job: Job, count: int) -> dict[str, float]:
    """Median seconds of each part of a step, timed one after the other in a step's own order.

    In turn, not each in a loop of its own: there they would find the caches warm, as they never do in a step.
    """
    settings = job.settings
    student = Projected(denoiser.student(), job.projection).train()
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    ema = Ema(parameters, settings)
    batch = next(steps(split, Order(settings.train_batch_size), seed=0, start=0, stop=1))[0]
    t = torch.randint(0, denoiser.num_train_timesteps, (settings.train_batch_size,))
    noised = denoiser.noised(batch, t, batch["noise"])

    def student_pass() -> None:
        prediction = denoiser.predict(student, noised.x_t, noised.t, {})
        nn.functional.mse_loss(prediction, noised.target).backward()

    def teacher_forward() -> None:
        with torch.no_grad():
            denoiser.predict(denoiser.module, noised.x_t, noised.t, {})

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    work = {"student forward and backward": student_pass, "teacher forward": teacher_forward,
            "optimizer (with clipping)": update, "EMA": ema.step}  # fmt: skip
    times: dict[str, Seconds] = {name: [] for name in work}
    for _ in range(count + 1):
        for name, part in work.items():
            started = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def plain_step(denoiser, split, job: Job, count: int) -> float:
    """Median seconds of a plain diffusers step: no teacher, no projection, the same batch and EMA."""
    settings, module = job.settings, denoiser.student().train()
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    images = split.images(list(range(min(len(split), settings.train_batch_size))))

    def step() -> None:
        noise = torch.randn_like(images)
        t = torch.randint(0, denoiser.num_train_timesteps, (len(images),))
        prediction = module(denoiser.scheduler.add_noise(images, noise, t), t).sample
        nn.functional.mse_loss(prediction, noise).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)

    return timed(step, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--steps", type=int, default=60, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    recipe = load(options.recipe).recipe
    base = Graph(recipe, download=True).base
    assert isinstance(base, Input), "a recipe with a pretrained model is expected"
    denoiser = family(recipe.model.family).load(base.folder)
    split, settings = load_splits(recipe.data)["train"], recipe.decouple
    subset = uniform(settings.num_ranges, denoiser.num_train_timesteps).subset(0)
    job = Job("expert", settings, subset, options.steps, settings.learning_rate, 0, settings.global_prob,
              settings.consistency_weight, settings.projection)  # fmt: skip

    rows: dict[str, Seconds] = {}
    for _ in range(options.repeats):
        measured = parts(denoiser, split, job, options.steps)
        measured["sum of the parts"] = sum(measured.values())
        measured["expert step"] = real_step(denoiser, split, job, recipe)
        measured["plain diffusers step"] = plain_step(denoiser, split, job, options.steps)
        for name, seconds in measured.items():
            rows.setdefault(name, []).append(seconds)

    count = sum(p.numel() for p in denoiser.module.parameters())
    print(
        f"{options.recipe}: {count:,} parameters, batch {settings.train_batch_size}, {torch.get_num_threads()} threads"
    )
    print("| part | ms, median (range) | images/s |\n| --- | --- | --- |")
    for name, values in rows.items():
        median = statistics.median(values)
        span = f"{1000 * min(values):.1f} to {1000 * max(values):.1f}"
        print(f"| {name} | {1000 * median:.1f} ({span}) | {settings.train_batch_size / median:,.0f} |")
    ratios = [a / b for a, b in zip(rows["expert step"], rows["sum of the parts"], strict=True)]
    print(f"\nexpert step / sum of the parts: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
