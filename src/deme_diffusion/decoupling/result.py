"""What a training leaves: the kept weights as a stock component, the raw ones beside, the projection's matrices."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from deme_diffusion.decoupling.ema import Ema
from deme_diffusion.decoupling.progress import Progress
from deme_diffusion.decoupling.student import Student, state_of
from deme_diffusion.lora import save_lora
from deme_diffusion.lora_files import LORA_NAME
from deme_diffusion.models import projection
from deme_diffusion.models.denoiser import Denoiser
from deme_diffusion.models.lora import Adapted, LowRank, factors_in
from deme_diffusion.models.projection import Projected
from deme_diffusion.weights import WEIGHTS_NAME, State, load_state, save_state


def write_result(
    denoiser: Denoiser,
    student: Student,
    ema: Ema | None,
    progress: Progress,
    keep: str,
    folder: Path,
    lora: LowRank | None = None,
) -> dict[str, Any]:
    """Leave the kept weights as a stock component, the raw ones beside, and the projection's matrices.

    Of adapters only theirs are left, as stock diffusers takes them.
    """
    raw = state_of(student)
    with ema.weights() if ema else nullcontext():
        kept = {key: value.detach().clone() for key, value in state_of(student).items()}
    kept_step = progress.step
    if keep == "best" and progress.best_step >= 0:
        kept, kept_step = load_state(best_file(folder / "work", progress.best_step)), progress.best_step
    if isinstance(student, Adapted):
        _save_adapters(denoiser, student, kept, folder, lora)
        if ema is not None:
            _save_adapters(denoiser, student, raw, folder / "raw", lora)
    else:
        component: Any = denoiser.module
        component.save_config(folder / denoiser.component)
        _save_student(student, kept, folder / denoiser.component)
        if ema is not None:
            component.save_config(folder / "raw")
            _save_student(student, raw, folder / "raw")
    return {
        "weights": "ema" if ema is not None else "raw",
        "kept_step": kept_step,
        "best_validation": progress.best_loss if math.isfinite(progress.best_loss) else None,
    }


def _save_adapters(denoiser: Denoiser, student: Adapted, state: State, folder: Path, lora: LowRank | None) -> None:
    layers = factors_in(state, student.scales())
    save_lora(folder / LORA_NAME, denoiser.component, layers, lora.base if lora else None)


def _save_student(student: Projected, state: State, folder: Path) -> None:
    component = {k.removeprefix("component."): v for k, v in state.items() if k.startswith("component.")}
    save_state(folder / WEIGHTS_NAME, component)
    places = student.projection.places
    projection.save(folder, {place: state[f"projection.matrices.{i}"] for i, place in enumerate(places)})


def best_file(work: Path, step: int) -> Path:
    """Where the best weights of a step are kept aside until the end."""
    return work / f"best-{step:08d}.safetensors"


def drop_older_bests(work: Path, progress: Progress) -> None:
    """Keep one best, the one that the newest checkpoint names."""
    # Only once a checkpoint that names the new best is on disk: an older checkpoint still names the older best.
    for old in work.glob("best-*.safetensors"):
        if old != best_file(work, progress.best_step):
            old.unlink()
