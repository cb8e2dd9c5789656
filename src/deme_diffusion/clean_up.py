"""Clean-up of the store: which artefacts runs and their experiments need, and those that nobody does. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from deme_diffusion.artefacts import Store, empty, try_lock
from deme_diffusion.errors import UserError

PLANS = "plans"
"""Beside the runs: plans that language models were asked for; no run, unless it has the record of one."""


def referenced(runs_root: Path) -> set[tuple[str, str]]:
    """The (stage, digest) that the run.json of runs and their experiments name; UserError where a run does not tell."""
    if not runs_root.is_dir():
        raise UserError(f"{runs_root} is not a folder of runs")
    found: set[tuple[str, str]] = set()
    for run in sorted(runs_root.iterdir()):
        # A link that leads nowhere may be a run on a disk that is not mounted, so it is not passed over.
        plans = run.name == PLANS and run.is_dir() and not (run / "run.json").exists()
        if run.name == "store" or run.name.startswith(".") or run.is_file() or plans:
            continue
        experiments = [folder for folder in run.glob("ablations/*") if not folder.is_file()]
        arms = [file.parent for file in run.glob("ablations/*/arms/*/run.json")]  # that were run by themselves as well
        for file in {*(folder / "run.json" for folder in (run, *experiments, *arms)), *_records_below(run)}:
            found |= _named_in(file)
    return found


def _records_below(run: Path) -> Iterator[Path]:
    """Every `run.json` below a run: an arm may have been run by itself, and be the baseline of an experiment."""

    def failed(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename} ({error.strerror}), so what this run needs is unknown")

    for folder, inner, files in os.walk(run, onerror=failed):
        inner[:] = [name for name in inner if name != "store"]
        yield from (Path(folder) / name for name in files if name == "run.json")
        # An experiment names its stages before it makes any; what is not beside a run's record is only called so.
        if Path(folder).name == "ablations" and (Path(folder).parent / "run.json").is_file():
            yield from (Path(folder) / name / "run.json" for name in inner)


def _named_in(file: Path) -> set[tuple[str, str]]:
    try:
        return {(str(stage["stage"]), str(stage["digest"])) for stage in json.loads(file.read_bytes())["stages"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"cannot read {file} ({type(error).__name__}), so what this run needs is unknown"
        raise UserError(f"{why}; mend it or move the folder away") from error


def clean(store: Store, keep: set[tuple[str, str]], dry_run: bool) -> list[tuple[Path, int]]:
    """Remove the artefacts not in `keep` that nobody is making; returns their folders and sizes in bytes."""
    removed = []
    for folder in sorted(store.root.glob("*/" + "[0-9a-f]" * 16)):  # nothing but what a key can have named
        if (folder.parent.name, folder.name) in keep or folder.is_symlink() or not folder.is_dir():
            continue
        with try_lock(folder) as ours:
            if ours:
                removed.append((folder, sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())))
            if ours and not dry_run:
                empty(folder)
                folder.rmdir()
    return removed
