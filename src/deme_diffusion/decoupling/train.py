"""The loop of one training, on accelerate: experts, controls and bases alike. Exact to resume when killed.

In several processes (`accelerate launch`, `torchrun`) all of them run it: the main one reads what there is, validates
and writes; what follows from that goes round (`agree`), so that all take the same steps and stop after the same one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from deme_diffusion.config import RuntimeSettings
from deme_diffusion.data.loading import Order, Trained, steps
from deme_diffusion.decoupling import checkpoint as checkpoints
from deme_diffusion.decoupling.agree import all_allow, any_of, from_main, gathered
from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.gradients import accumulated
from deme_diffusion.decoupling.journal import Journal
from deme_diffusion.decoupling.memory import check_memory
from deme_diffusion.decoupling.multi_task import multi_task
from deme_diffusion.decoupling.progress import Progress, environment_of, restore, snapshot
from deme_diffusion.decoupling.result import best_file, drop_older_bests, write_result
from deme_diffusion.decoupling.setup import learning_rates, make_accelerator, make_optimizer
from deme_diffusion.decoupling.signals import stop_signals
from deme_diffusion.decoupling.step import Combine, Job, StepLosses, TrainStep, total
from deme_diffusion.decoupling.student import borrowed, state_of, student_of
from deme_diffusion.decoupling.switches import check_compiled, laid_out, switched
from deme_diffusion.decoupling.teacher import Averaged, teaching
from deme_diffusion.decoupling.waiting import Waited
from deme_diffusion.division import names_of, reported, whole
from deme_diffusion.errors import Interrupted, MachineError
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.objective import FixedNoise
from deme_diffusion.weights import save_state

log = logging.getLogger(__name__)
MOST_SKIPPED = 20
Preview = Callable[[nn.Module, Path], None]


def train(
    denoiser: Denoiser,
    images: Trained,
    job: Job,
    folder: Path,
    *,
    runtime: RuntimeSettings,
    validation: FixedNoise | None = None,
    preview: Preview | None = None,
    combine: Combine = total,
) -> dict[str, Any]:
    """Train one model into `folder` (`<component>/`, `raw/`, logs), going on from the newest checkpoint in it.

    Returns the results for the manifest. Raises Interrupted after a SIGINT or SIGTERM (a checkpoint is written),
    MachineError at a non-finite loss (before the step; the last checkpoint stays), and UserError before the first
    step where the memory will not do.
    """
    with switched(runtime, allow_tf32=job.settings.allow_tf32), borrowed(denoiser, job, runtime):
        return _train(denoiser, images, job, folder, runtime, validation, preview, combine)


def _train(
    denoiser: Denoiser,
    images: Trained,
    job: Job,
    folder: Path,
    runtime: RuntimeSettings,
    validation: FixedNoise | None,
    preview: Preview | None,
    combine: Combine,
) -> dict[str, Any]:
    # -- what takes part ----------------------------------------------------------------------------
    settings, work = job.settings, folder / "work"
    accelerator = make_accelerator(job, runtime.device)
    main, processes = accelerator.is_main_process, accelerator.num_processes
    all_allow(accelerator, lambda: check_memory(denoiser, job, runtime, accelerator.device, processes))
    unwrapped = student_of(denoiser, job, runtime)
    unwrapped.to(accelerator.device).train()
    if runtime.compile:
        check_compiled(denoiser, unwrapped, settings)
    parameters = denoiser.trainable(unwrapped)
    weighing = multi_task(denoiser, job, parameters, accelerator.device, compiled=runtime.compile)
    optimizer: Any = make_optimizer(parameters, job, accelerator.device, weighing)
    student: nn.Module
    student, optimizer = accelerator.prepare(unwrapped, optimizer)
    ema = Ema(parameters, settings, offload=runtime.offload_ema) if settings.use_ema else None
    rate = learning_rates(job)
    order = Order(
        settings.train_batch_size,
        settings.gradient_accumulation_steps,
        accelerator.process_index,
        processes,
    )
    tasks = None if weighing is None else weighing.owners
    train_step = TrainStep(denoiser, job, accelerator.device, weighing or combine, processes, tasks)
    ranges = reported(job.subset, denoiser.num_train_timesteps)
    names = names_of(ranges)

    with teaching(denoiser, job) as teacher, stop_signals() as stop:
        if teacher is not None and job.lora is None:  # else it is the student without its adapters
            teacher = laid_out(teacher.to(accelerator.device), runtime)
        renewed = Averaged(denoiser, teacher, ema, job.teacher_update_steps) \
            if teacher is not None and ema is not None and job.teacher == "ema" else None  # fmt: skip

        # -- where it stands -----------------------------------------------------------------------
        progress = Progress(environment=environment_of(accelerator))
        resumed = checkpoints.latest(work) if main else None
        if (after := from_main(accelerator, resumed.step if resumed else None)) is not None:
            resumed = resumed or checkpoints.at(work, after)
            progress = restore(resumed, accelerator, student, optimizer, ema, renewed, progress.environment, weighing)
            log.info("%s: going on after step %d of %d", job.name, progress.step, job.steps)
            del resumed
        journal = Journal(folder, names, after=progress.step, board_every=max(1, runtime.logging_steps // 5),
                          active=main)  # fmt: skip

        def save_checkpoint() -> None:
            if main:
                journal.flush()
                state = snapshot(accelerator, student, optimizer, ema, renewed, progress, weighing)
                checkpoints.save(work, state, limit=runtime.checkpoints_total_limit)
                drop_older_bests(work, progress)

        # -- the loop ------------------------------------------------------------------------------
        started, seen = time.perf_counter(), 0
        bar = tqdm(total=job.steps * order.step_size, initial=progress.step * order.step_size, desc=job.name,
                   unit="img", disable=None if main else True)  # fmt: skip
        workers = runtime.dataloader_num_workers
        waited = Waited(job.name, workers)
        with bar, journal:
            for micro_batches in waited.over(
                steps(
                    images,
                    order,
                    seed=job.seed,
                    start=progress.step,
                    stop=job.steps,
                    workers=workers,
                    shape=denoiser.sample_shape,
                    empty=settings.proportion_empty_prompts,
                )
            ):
                if _finished(progress, settings.early_stopping):
                    break
                optimizer.param_groups[0]["lr"] = rate(progress.step)  # the model's; a multi-task method has its own
                mine = accumulated(accelerator, train_step, student, teacher, micro_batches, weighing)
                clipped = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
                losses, norm, stopping = gathered(accelerator, mine, clipped, stop.is_set())
                _update(accelerator, optimizer, losses, norm, job, progress, names)
                if ema is not None and not progress.skipped_in_a_row:
                    ema.step()
                progress.step += 1
                if renewed is not None:
                    renewed.step(progress.step)
                seen += order.step_size
                bar.update(order.step_size)
                told = None if weighing is None else weighing.told(progress.step)
                journal.step(progress.step, losses, rate(progress.step - 1), norm, told)
                last = progress.step == job.steps

                if validation is not None and (progress.step % settings.validation_steps == 0 or last):
                    if main:
                        with ema.weights() if ema else nullcontext():
                            _validate(validation, unwrapped, job, progress, journal, work)
                    progress.stale_validations = from_main(accelerator, progress.stale_validations)
                if main and preview is not None and _every(runtime.preview_steps, progress.step):
                    with ema.weights() if ema else nullcontext():
                        preview(unwrapped.component.eval(), folder / "previews" / f"{progress.step:08d}.png")
                        unwrapped.train()
                if main and (progress.step % runtime.logging_steps == 0 or last):
                    waited.tell()
                if bar.disable and (progress.step % runtime.logging_steps == 0 or last):
                    _say(job, progress, losses, seen / (time.perf_counter() - started), order.step_size)
                if processes == 1 or last:  # in the last step too: the stages that follow must stop as well
                    stopping = any_of(accelerator, stopping or stop.is_set())
                if stopping:
                    save_checkpoint()
                    raise Interrupted(f"{job.name}: checkpoint written after step {progress.step} of {job.steps}")
                if progress.step % runtime.checkpointing_steps == 0 or last:
                    save_checkpoint()

    # -- what is left ------------------------------------------------------------------------------
    speed = seen / (time.perf_counter() - started)
    results = {"steps": progress.step, "updates": progress.updates, "images_per_second": round(speed, 1),
               "waiting": round(waited.share, 4)}  # fmt: skip
    if not main:
        return results
    return {**results, **write_result(denoiser, unwrapped, ema, progress, settings.keep, folder, job.lora)}


def _update(
    accelerator: Accelerator,
    optimizer: Any,
    losses: list[StepLosses],
    norm: float,
    job: Job,
    progress: Progress,
    names: list[str],
) -> None:
    """Step, unless the loss or the gradient (of `norm` before clipping) is not finite."""
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
            save_state(best_file(work, progress.step), state_of(student))
    else:
        progress.stale_validations += 1


def _every(count: int, step: int) -> bool:
    return bool(count) and step % count == 0


def _finished(progress: Progress, patience: int) -> bool:
    return bool(patience) and progress.stale_validations >= patience


def _say(job: Job, progress: Progress, losses: list[StepLosses], speed: float, step_size: int) -> None:
    loss = sum(float(part.denoising.mean()) for part in losses) / len(losses)
    left = (job.steps - progress.step) * step_size / speed
    log.info(
        "%s: step %d/%d, loss %.4f, %.0f images/s, %.0f s left", job.name, progress.step, job.steps, loss, speed, left
    )
