"""Disk and memory: what the stages that are not done need, against what the machine has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from deme_diffusion.decoupling.memory import free_memory
from deme_diffusion.doctor.finding import Finding
from deme_diffusion.pipeline.estimate import plan
from deme_diffusion.pipeline.run import Run
from deme_diffusion.pipeline.workbench import device_of

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
    for kind, needed in (planned["memory_bytes"] or {}).items():
        if free is not None and needed:
            yield compared(f"memory for {kind}", needed, free, f"on the {device.type}")


def compared(topic: str, needed: float, free: float, where: str) -> Finding:
    """One need against what is free."""
    said = f"about {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free {where}"
    if needed > free:
        return Finding("problem", topic, said)
    return Finding("warning" if needed * ENOUGH > free else "ok", topic, said)
