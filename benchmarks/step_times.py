"""What `train_step.py` times: a step inside the real loop, its parts one by one, and a step of a plain loop."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from deme_diffusion.config import RuntimeSettings
from deme_diffusion.data.loading import Order, Trained, steps
from deme_diffusion.decoupling import train as training
from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.setup import make_optimizer
from deme_diffusion.decoupling.step import Job, total
from deme_diffusion.decoupling.student import borrowed, student_of
from deme_diffusion.decoupling.switches import laid_out, switched
from deme_diffusion.decoupling.teacher import teaching
from deme_diffusion.decoupling.train import train
from deme_diffusion.models.denoiser import Denoiser, Noised, on_device

WARM_UP = 5
Seconds = dict[str, float]


def now(device: torch.device) -> float:
    """The time when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- the real loop ---------------------------------------------------------------------------------


class Enough(Exception):
    """All steps that are to be timed are done; what a training leaves need not be written."""


def real_step(denoiser: Denoiser, images: Trained, job: Job, runtime: RuntimeSettings) -> Seconds:
    """Median seconds of a step and of its waiting for the batch, and peak bytes, inside the real loop."""
    moments: list[float] = []
    waits: list[float] = []
    device = torch.device(runtime.device)

    def combine(losses: dict[int, torch.Tensor]) -> torch.Tensor:
        moments.append(time.perf_counter())  # no synchronising: a step waits for the device once, by itself
        if len(moments) > job.steps:
            raise Enough
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
            train(denoiser, images, replace(job, steps=job.steps + 1), Path(folder), runtime=runtime, combine=combine)
    except Enough:
        pass
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


def parts(denoiser: Denoiser, images: Trained, job: Job, runtime: RuntimeSettings, count: int) -> Seconds:
    """Median seconds of each part of a step, timed one after the other in a step's own order.

    In turn, not each in a loop of its own: there they would find the caches warm, as they never do in a step.
    """
    settings, device = job.settings, torch.device(runtime.device)
    denoiser.module.to(device).eval()
    with switched(runtime, allow_tf32=settings.allow_tf32), borrowed(denoiser, job, runtime):
        student = student_of(denoiser, job, runtime).to(device).train()
        with teaching(denoiser, job) as own:
            assert own is not None, "what the teacher costs is asked"
            teacher = own.to(device) if job.lora else laid_out(own.to(device), runtime)
            parameters = denoiser.trainable(student)
            optimizer = make_optimizer(parameters, job, device)
            ema, noised = (
                Ema(parameters, settings, offload=runtime.offload_ema),
                one_batch(denoiser, images, job, device),
            )

            def student_pass() -> None:
                backward(denoiser, student, noised, job)

            def teacher_forward() -> None:
                with torch.no_grad(), autocast(job, device):
                    denoiser.answer(teacher, noised)

            def update() -> None:
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            work = {"student": student_pass, "teacher": teacher_forward, "optimizer": update, "EMA": ema.step}
            times: dict[str, list[float]] = {name: [] for name in work}
            for _ in range(count + WARM_UP):
                for name, part in work.items():
                    started = now(device)
                    part()
                    times[name].append(now(device) - started)
    return {name: statistics.median(each[WARM_UP:]) for name, each in times.items()}


def one_batch(denoiser: Denoiser, images: Trained, job: Job, device: torch.device) -> Noised:
    """A batch of training, noised."""
    order = Order(job.settings.train_batch_size)
    batch = on_device(next(steps(images, order, seed=0, start=0, stop=1, shape=denoiser.sample_shape))[0], device)
    t = torch.randint(0, denoiser.num_train_timesteps, (order.batch_size,), device=device)
    return denoiser.noised(batch, t, batch["noise"])


def autocast(job: Job, device: torch.device) -> torch.autocast:
    """The precision that a job computes in."""
    half = torch.float16 if job.settings.mixed_precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=half, enabled=job.settings.mixed_precision != "no")


def backward(denoiser: Denoiser, student: nn.Module, noised: Noised, job: Job) -> None:
    """Forward and backward pass of the denoising loss."""
    with autocast(job, noised.x_t.device):
        prediction = denoiser.answer(student, noised)
    nn.functional.mse_loss(prediction.float(), noised.target).backward()


def plain_step(denoiser: Denoiser, images: Trained, job: Job, runtime: RuntimeSettings, count: int) -> float:
    """Median seconds of a plain diffusers step in the same precision: no teacher, no projection, the same batch and
    EMA; of adapters too, where the job trains them."""
    device, plain = torch.device(runtime.device), replace(job, projection="none", projection_axes="channel")
    with borrowed(denoiser, plain, runtime):
        module = student_of(denoiser, plain, runtime.model_copy(update={"compile": False})).to(device).train()
        parameters = denoiser.trainable(module)
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.95, 0.999), weight_decay=1e-6)
        ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        clean = one_batch(denoiser, images, job, device)

        def step() -> None:
            noise = torch.randn_like(clean.x_t)
            t = torch.randint(0, denoiser.num_train_timesteps, (len(noise),), device=device)
            backward(denoiser, module, replace(clean, x_t=clean.x_t + noise, t=t), job)
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


def measured(denoiser: Denoiser, images: Trained, job: Job, runtime: RuntimeSettings, repeats: int) -> list[Seconds]:
    """Everything, so many times, in turn."""
    results = []
    for _ in range(repeats):
        each = parts(denoiser, images, job, runtime, job.steps)
        each |= {"sum": sum(each.values()), **real_step(denoiser, images, job, runtime)}
        each["plain"] = plain_step(denoiser, images, job, runtime, job.steps)
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
