"""What an artefact was made by: versions, machine, and the commit of the source tree. No torch."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from deme_diffusion.files import Record, canonical_digest

_DISTRIBUTIONS = ("torch", "diffusers", "accelerate", "safetensors", "numpy", "deme-diffusion")


def provenance() -> Record:
    """The software and machine of this process; what cannot be found out is None, and nothing is raised."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "processor": _processor(),
        "memory": _memory(),
        "gpus": _gpus(),
        "versions": {name: _version(name) for name in _DISTRIBUTIONS},
        "git": _git(Path(__file__).resolve().parents[2]),
    }


UNKNOWN = "unknown"
_MADE_BY = ("processor", "memory", "gpus", "versions", "git")
_BESIDE = ("python", "platform", "processors")


def made_by(records: Iterable[Record | None]) -> list[Record]:
    """One record for each machine and software that made some stages, of the most stages first; `stages` counts them.

    `records` is the provenance of each stage. What it does not say is `UNKNOWN`: nothing is taken from another record,
    nor from this machine. Python, platform and number of processors are lists where they differ within one record.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        told = _told(record)
        groups.setdefault(canonical_digest({name: told[name] for name in _MADE_BY}), []).append(told)
    return [_of_all(group) for group in sorted(groups.values(), key=len, reverse=True)]


def _told(record: Record | None) -> Record:
    """The fields of a stage's provenance; None stays where it says something: no GPU's driver, no source tree."""
    given = record if isinstance(record, dict) else {}
    told = {name: given.get(name, UNKNOWN) for name in (*_MADE_BY, *_BESIDE)}
    return {name: UNKNOWN if value is None and name not in ("gpus", "git") else value for name, value in told.items()}


def _of_all(group: list[Record]) -> Record:
    beside = {name: list({str(one[name]): one[name] for one in group}.values()) for name in _BESIDE}
    same = {name: values[0] if len(values) == 1 else values for name, values in beside.items()}
    return {"stages": len(group), **{name: group[0][name] for name in _MADE_BY}, **same}


def machine_of(record: Record | None) -> str | None:
    """The machine in words, for telling two apart; None where a stage's provenance does not say enough for that."""
    told = _told(record)
    if UNKNOWN in (told["processor"], told["processors"], told["memory"], told["gpus"]):
        return None
    gpus = ", ".join(map(str, told["gpus"] or ())) or "no GPU"
    return f"{told['processors']} x {told['processor']}, {told['memory']}, {gpus}"


@cache
def _processor() -> str | None:
    """The processor's model, where the system tells it, else its architecture."""
    with contextlib.suppress(OSError, ValueError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine() or None


def _memory() -> str | None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
    return None


@cache
def _gpus() -> list[str] | None:
    """Name and memory of each NVIDIA GPU of the machine, as its driver tells; None where there is no driver."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return [line.strip() for line in told.splitlines() if line.strip()]
    return None


def _version(name: str) -> str | None:
    with contextlib.suppress(Exception):  # a broken installation has many ways to fail
        return metadata.version(name)
    return None


@cache  # the code that runs is the code at the start, whatever is edited meanwhile
def _git(source: Path) -> Record | None:
    """Commit and dirty flag; None unless `source` itself is a checkout: a venv within one does not count."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(source), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True).stdout

    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        if (source / ".git").exists():
            return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    return None
