"""What a training is built from: accelerate's processes and devices, the optimizer, the learning rates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from deme_diffusion.config import TrainSettings
from deme_diffusion.decoupling.multi_task import OWN_RATE, MultiTask
from deme_diffusion.decoupling.step import Job
from deme_diffusion.errors import UserError
from deme_diffusion.models.devices import device_of

log = logging.getLogger(__name__)
PATIENCE = timedelta(days=7)
"""How long processes wait for each other: for the main one's validations, and for all of its other stages."""
PLAIN = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def on_cpu(device: str) -> bool:
    """As for sampling; accelerate alone would take a Mac's GPU, without float64. UserError for CUDA without a GPU."""
    return device_of(device).type == "cpu"


def make_accelerator(job: Job, device: str) -> Accelerator:
    """accelerate for one training. Raises UserError for fp16 on a CPU, and for processes that the job is not for."""
    mixed_precision, wanted = job.settings.mixed_precision, job.settings.processes
    # One process trains several models, perhaps at several precisions, which accelerate's singleton would refuse.
    AcceleratorState._reset_state(reset_partial_state=False)
    patient = InitProcessGroupKwargs(backend=None, timeout=PATIENCE)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu(device), kwargs_handlers=[patient])
    accelerator.gradient_accumulation_steps = 1  # a launcher's own would divide the loss once more
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed_precision: fp16 needs a GPU (accelerate would quietly train in fp32); use bf16 or no")
    if accelerator.distributed_type not in PLAIN:
        raise UserError(
            f"accelerate is set up for {accelerator.distributed_type.value}, but experts are trained whole: "
            "launch with --multi_gpu, or by torchrun"
        )
    if accelerator.num_processes != wanted:  # another batch: never what a checkpoint or an artefact of it holds
        how = f"by torchrun --nproc_per_node {wanted} -m deme_diffusion" if wanted > 1 else "without a launcher"
        raise UserError(f"{job.name}: processes={wanted}, but {accelerator.num_processes} run; start it {how}")
    return accelerator


def make_optimizer(
    parameters: list[nn.Parameter], job: Job, device: torch.device, weighing: MultiTask | None = None
) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or bitsandbytes' with moments in 8 bits.

    What a multi-task method learns itself is a second group, at a rate of its own and without weight decay.
    """
    settings = job.settings
    options: dict[str, Any] = {
        "lr": job.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.adam_weight_decay,
    }
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if weighing is not None and (own := weighing.parameters()):
        groups.append({"params": own, "lr": OWN_RATE, "weight_decay": 0.0})
    if settings.use_8bit_adam:
        if any(not parameter.is_contiguous() for parameter in parameters):
            log.warning(
                "%s: use_8bit_adam undoes runtime.channels_last in its first step (bitsandbytes makes weights "
                "contiguous); set one of them to false",
                job.name,
            )
        return _eight_bit(settings, device)(groups, **options)
    # A fused optimizer skips an overflow inside its kernel, where accelerate's `step_was_skipped` cannot see it.
    return torch.optim.AdamW(groups, fused=settings.mixed_precision != "fp16", **options)


def _eight_bit(settings: TrainSettings, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    try:
        import bitsandbytes
    except ImportError:
        why = "needs bitsandbytes: pip install 'deme-diffusion[8bit]', or use_8bit_adam=false"
        raise UserError(f"use_8bit_adam {why}") from None
    if device.type != "cuda":
        raise UserError(f"use_8bit_adam needs a GPU, and this training runs on the {device.type}; set it to false")
    optimizer: Callable[..., torch.optim.Optimizer] = bitsandbytes.optim.AdamW8bit
    return optimizer


def learning_rates(job: Job) -> Callable[[int], float]:
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
