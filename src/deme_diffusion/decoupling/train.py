"""The loop of one training, on accelerate: experts, controls and bases alike. Exact to resume when killed."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from tqdm.auto import tqdm

from deme_diffusion.config import RuntimeSettings
from deme_diffusion.data.loading import Batch, Order, steps
from deme_diffusion.data.splits import Split
from deme_diffusion.decoupling import checkpoint as checkpoints
from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.journal import Journal
from deme_diffusion.decoupling.progress import Progress, environment_of, restore, snapshot
from deme_diffusion.decoupling.result import best_file, drop_older_bests, write_result
from deme_diffusion.decoupling.step import Combine, Job, StepLosses, TrainStep, total
from deme_diffusion.division import name_of, reported, whole
from deme_diffusion.errors import Interrupted, MachineError, UserError
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.models.projection import Projected
from deme_diffusion.rng import seed_of
from deme_diffusion.weights import save_state

log = logging.getLogger(__name__)
MOST_SKIPPED = 20
SAME_STOP = 1.0
"""Seconds in which further signals are the same wish: one to a process group reaches a worker twice."""
Preview = Callable[[nn.Module, Path], None]


def train(
    denoiser: Denoiser,
    images: Split,
    job: Job,
    folder: Path,
    *,
    runtime: RuntimeSettings,
    validation: FixedNoise | None = None,
    preview: Preview | None = None,
    combine: Combine = total,
) -> dict[str, Any]:
    """Train one model into `folder` (`<component>/`, `raw/`, logs), going on from the newest checkpoint in it.

    Returns the results for the manifest. Raises Interrupted after a SIGINT or SIGTERM (a checkpoint is written), and
    MachineError at a non-finite loss (before the step; the last checkpoint stays).
    """
    # -- what takes part ----------------------------------------------------------------------------
    settings, work = job.settings, folder / "work"
    accelerator = _accelerator(settings.mixed_precision, runtime.device)
    student: nn.Module = Projected(denoiser.student(), job.projection)
    parameters = denoiser.trainable(student)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=job.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.adam_weight_decay,
        # A fused optimizer skips an overflow inside its kernel, where accelerate's `step_was_skipped` cannot see it.
        fused=settings.mixed_precision != "fp16",
    )
    student, optimizer = accelerator.prepare(student.train(), optimizer)
    ema = Ema(parameters, settings) if settings.use_ema else None
    rate = _learning_rates(job)
    order = Order(
        settings.train_batch_size,
        settings.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    train_step = TrainStep(denoiser, job, accelerator.device, combine)

    # -- where it stands ---------------------------------------------------------------------------
    progress = Progress(environment=environment_of(accelerator))
    resumed = checkpoints.latest(work)
    if resumed is not None:
        progress = restore(resumed, accelerator, student, optimizer, ema, progress.environment)
        log.info("%s: going on after step %d of %d", job.name, progress.step, job.steps)
    ranges = reported(job.subset, denoiser.num_train_timesteps)
    names = [name_of(runs) for runs in ranges]
    journal = Journal(folder, names, after=progress.step, board_every=max(1, runtime.logging_steps // 5),
                      active=accelerator.is_main_process)  # fmt: skip

    def save_checkpoint() -> None:
        if accelerator.is_main_process:
            journal.flush()
            state = snapshot(accelerator, student, optimizer, ema, progress)
            checkpoints.save(work, state, limit=runtime.checkpoints_total_limit)
            drop_older_bests(work, progress)

    # -- the loop ----------------------------------------------------------------------------------
    teaching = denoiser.teacher() if job.consistency_weight else nullcontext(None)
    started, seen = time.perf_counter(), 0
    bar = tqdm(total=job.steps * order.step_size, initial=progress.step * order.step_size, desc=job.name, unit="img",
               disable=None if accelerator.is_main_process else True)  # fmt: skip
    with teaching as teacher, _stop_signals() as stop, bar, journal:
        teacher = teacher.to(accelerator.device) if teacher is not None else None
        batches = steps(
            images, order, seed=job.seed, start=progress.step, stop=job.steps, workers=runtime.dataloader_num_workers
        )
        for micro_batches in batches:
            if _finished(progress, settings.early_stopping):
                break
            for group in optimizer.param_groups:
                group["lr"] = rate(progress.step)
            losses = _gradients(accelerator, train_step, student, teacher, micro_batches)
            norm = _update(accelerator, optimizer, parameters, losses, job, progress, names)
            if ema is not None and not progress.skipped_in_a_row:
                ema.step()
            progress.step += 1
            seen += order.step_size
            bar.update(order.step_size)
            journal.step(progress.step, losses, rate(progress.step - 1), norm)
            last = progress.step == job.steps

            if validation is not None and (progress.step % settings.validation_steps == 0 or last):
                with ema.weights() if ema else nullcontext():
                    _validate(validation, accelerator.unwrap_model(student), job, progress, journal, work)
            if preview is not None and runtime.preview_steps and progress.step % runtime.preview_steps == 0:
                with ema.weights() if ema else nullcontext():
                    preview(accelerator.unwrap_model(student).eval(), folder / "previews" / f"{progress.step:08d}.png")
                    student.train()
            if bar.disable and (progress.step % runtime.logging_steps == 0 or last):
                _say(job, progress, losses, seen / (time.perf_counter() - started), order.step_size)
            if stop.is_set():  # in the last step too: the stages that follow must stop as well
                save_checkpoint()
                raise Interrupted(f"{job.name}: checkpoint written after step {progress.step} of {job.steps}")
            if progress.step % runtime.checkpointing_steps == 0 or last:
                save_checkpoint()

    # -- what is left ------------------------------------------------------------------------------
    speed = seen / (time.perf_counter() - started)
    results = {"steps": progress.step, "updates": progress.updates, "images_per_second": round(speed, 1)}
    return {
        **results,
        **write_result(denoiser, accelerator.unwrap_model(student), ema, progress, settings.keep, folder),
    }


def _accelerator(mixed_precision: str, device: str) -> Accelerator:
    # One process trains several models, perhaps at several precisions, which accelerate's singleton would refuse.
    AcceleratorState._reset_state(reset_partial_state=False)
    # `auto` means CUDA or the CPU, as it does for sampling; accelerate alone would take a Mac's GPU, without float64.
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device == "cpu" or not torch.cuda.is_available())
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed_precision: fp16 needs a GPU (accelerate would quietly train in fp32); use bf16 or no")
    return accelerator


def _learning_rates(job: Job) -> Callable[[int], float]:
    """The learning rate of each step as a pure function, so that there is nothing to resume."""
    from diffusers.optimization import get_scheduler

    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        job.settings.lr_scheduler,
        dummy,
        num_warmup_steps=job.settings.lr_warmup_steps,
        num_training_steps=job.steps,
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: job.learning_rate * float(factor(step))


def _gradients(
    accelerator: Accelerator, train_step: TrainStep, student: nn.Module, teacher: nn.Module | None, micro: list[Batch]
) -> list[StepLosses]:
    """Accumulate the gradients of one step."""
    losses = []
    for i, batch in enumerate(micro):
        # Dropout draws from the global generator: set anew for each micro-batch, it needs no place in a checkpoint.
        torch.manual_seed(seed_of(train_step.job.seed, "dropout", batch["step"], batch["first"]))
        syncing = i == len(micro) - 1
        with nullcontext() if syncing else accelerator.no_sync(student), accelerator.autocast():
            loss, record = train_step(student, teacher, batch)
        with nullcontext() if syncing else accelerator.no_sync(student):
            accelerator.backward(loss / len(micro))
        losses.append(record)
    return losses


def _update(
    accelerator: Accelerator,
    optimizer: Any,
    parameters: list[nn.Parameter],
    losses: list[StepLosses],
    job: Job,
    progress: Progress,
    names: list[str],
) -> float:
    """Clip and step, unless the loss or gradient is not finite; returns the gradient's norm before clipping."""
    norm = float(accelerator.clip_grad_norm_(parameters, job.settings.max_grad_norm))
    finite = math.isfinite(norm) and all(bool(torch.isfinite(part.loss).all()) for part in losses)
    if not finite and accelerator.scaler is None:
        raise MachineError(_not_finite(losses, norm, progress.step + 1, job.name, names))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if optimizer.step_was_skipped else 0
    progress.updates += not optimizer.step_was_skipped
    if progress.skipped_in_a_row >= MOST_SKIPPED:
        raise MachineError(
            f"{job.name}: {MOST_SKIPPED} updates in a row overflowed in fp16, the last at step {progress.step + 1}; "
            "use mixed_precision bf16 or no"
        )
    return norm


def _not_finite(losses: list[StepLosses], norm: float, step: int, name: str, names: list[str]) -> str:
    for part in losses:
        bad = ~torch.isfinite(part.loss)
        if bad.any():
            where = names[int(part.owner[bad][0])]
            return f"{name}: loss {float(part.loss[bad][0])} at step {step} in {where}; the last checkpoint is kept"
    return f"{name}: gradient norm {norm} at step {step} with a finite loss; the last checkpoint is kept"


def _validate(
    validation: FixedNoise, student: nn.Module, job: Job, progress: Progress, journal: Journal, work: Path
) -> None:
    """The fixed-noise loss per range; the best weights so far, by the job's own timesteps, are kept aside."""
    student.eval()
    losses = validation.losses(student)
    student.train()
    overall = validation.overall(losses)
    everywhere = job.subset == whole(validation.denoiser.num_train_timesteps)
    criterion = overall if everywhere else losses[0]  # else the first reported range is the job's own subset
    journal.validation(progress.step, losses, overall, criterion)
    if criterion < progress.best_loss:
        progress.best_loss, progress.best_step, progress.stale_validations = criterion, progress.step, 0
        if job.settings.keep == "best":
            save_state(best_file(work, progress.step), student.state_dict())
    else:
        progress.stale_validations += 1


def _finished(progress: Progress, patience: int) -> bool:
    return bool(patience) and progress.stale_validations >= patience


def _say(job: Job, progress: Progress, losses: list[StepLosses], speed: float, step_size: int) -> None:
    loss = sum(float(part.denoising.mean()) for part in losses) / len(losses)
    left = (job.steps - progress.step) * step_size / speed
    log.info(
        "%s: step %d/%d, loss %.4f, %.0f images/s, %.0f s left", job.name, progress.step, job.steps, loss, speed, left
    )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that the loop stops between steps; a second one kills as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    first = math.inf

    def request(number: int, frame: Any) -> None:
        nonlocal first
        if time.monotonic() > first + SAME_STOP:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        first = min(first, time.monotonic())
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
