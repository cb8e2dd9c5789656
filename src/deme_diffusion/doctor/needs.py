"""Disk and memory: what the stages that are not done need, against what the machine has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from deme_diffusion.config import ModelSettings
from deme_diffusion.decoupling.memory import altogether, free_memory
from deme_diffusion.doctor.finding import Finding
from deme_diffusion.errors import UserError
from deme_diffusion.models.ddpm import DDPM
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.devices import device_of
from deme_diffusion.models.families import family
from deme_diffusion.pipeline.estimate import plan
from deme_diffusion.pipeline.inputs import Input
from deme_diffusion.pipeline.needs import model_cost
from deme_diffusion.pipeline.run import Run
from deme_diffusion.pipeline.space import BYTES
from deme_diffusion.pipeline.stages import job_of

TRAININGS = ("pretrain", "decouple")
ENOUGH = 1.1
"""The estimates are rough: what leaves less than a tenth is told."""


def findings(run: Run) -> Iterator[Finding]:
    """The dry run's estimates, compared."""
    planned = plan(run)
    for entry in planned["downloads"]:
        size = f", {entry['bytes'] / 1e9:.1f} GB" if entry["bytes"] else ""
        yield Finding("warning", "download", f"{entry['name']} ({entry['kind']}{size}) is not here yet")
    if planned["disk_bytes"] is None:
        yield Finding("warning", "disk, memory", "unknown before the base is here")
        return
    folder = run.store.root.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    yield compared("disk", planned["disk_bytes"], shutil.disk_usage(existing).free, f"in {existing}")
    device = device_of(run.recipe.runtime.device)
    free = free_memory(device)
    memory = dict(planned["memory_bytes"] or {})
    try:
        training = training_memory(run, device)
    except UserError as error:
        yield Finding("problem", "model", str(error))
        return
    if training is not None:
        memory["training"] = training
    for kind, needed in memory.items():
        if free is not None and needed:
            yield compared(f"memory for {kind}", needed, free, f"on the {device.type}")


def training_memory(run: Run, device: torch.device) -> int | None:
    """Bytes of the largest training that is not done, by its own check; None before the base is here."""
    graph, store = run.graph, run.store
    missing = {node.stage: node for node in graph.nodes if node.stage in TRAININGS and store.find(node.key) is None}
    base = _base(run) if missing else None
    if base is None:
        return None
    runtime = graph.recipe.runtime
    return max(altogether(base, job_of(graph.recipe, node), runtime, device) for node in missing.values())


def _base(run: Run) -> Denoiser | None:
    """The base, or one of its shape where it is to be trained; None where it is not here, or too large to open."""
    base, recipe = run.graph.base, run.recipe
    if isinstance(base, Input):
        folder = base.path
    elif run.store.find(base.key) is None:
        return DDPM.from_scratch(recipe.pretrain, out_seed=0)
    else:
        folder = run.store.folder(base.key)
    if folder is None or not _opens(run):
        return None
    try:
        return _opened(recipe.model, folder)
    except UserError:
        if recipe.model.latent:  # of others the checks of model and data tell
            raise
        return None


def _opened(settings: ModelSettings, folder: Path) -> Denoiser:
    dtype = None if settings.dtype == "float32" else getattr(torch, settings.dtype)
    found = family(settings.family).load(folder, dtype)
    found.configure(settings)
    return found


def _opens(run: Run) -> bool:
    """Whether the base takes no more than half of what is free: the doctor opens it beside whatever else runs."""
    cost, free = model_cost(run.graph), free_memory(torch.device("cpu"))
    held = 0 if cost is None else BYTES[run.recipe.model.dtype] * cost.parameters
    return free is None or held <= free / 2


def compared(topic: str, needed: float, free: float, where: str) -> Finding:
    """One need against what is free."""
    said = f"about {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free {where}"
    if needed > free:
        return Finding("problem", topic, said)
    return Finding("warning" if needed * ENOUGH > free else "ok", topic, said)
