"""What an artefact was made by: versions, machine, and the commit of the source tree. No torch."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from deme_diffusion.files import Record

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
