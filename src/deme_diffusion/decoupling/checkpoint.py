"""Checkpoints of one training: tensors as safetensors, the rest as JSON, whole or not there. Never a pickle."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.files import file_digest, write_json
from deme_diffusion.weights import State, load_state, save_state

log = logging.getLogger(__name__)
TENSORS, RECORD = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to go on after `step` finished steps."""

    step: int
    tensors: State
    record: dict[str, Any]

    def part(self, name: str) -> State:
        """The tensors whose names begin with `name/`, without it."""
        return {
            key.removeprefix(f"{name}/"): value for key, value in self.tensors.items() if key.startswith(f"{name}/")
        }


def save(work: Path, checkpoint: Checkpoint, *, limit: int) -> None:
    """Write `work/checkpoint-<step>`, the record last, then drop all but the newest `limit`."""
    folder = _folder(work, checkpoint.step)
    folder.mkdir(parents=True, exist_ok=True)
    save_state(folder / TENSORS, checkpoint.tensors)
    record = {**checkpoint.record, "step": checkpoint.step, "sha256": file_digest(folder / TENSORS)}
    write_json(folder / RECORD, record)
    for old in _folders(work)[:-limit]:
        shutil.rmtree(old)


def latest(work: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; broken ones are named in the log, removed and passed over."""
    for folder in reversed(_folders(work)):
        try:
            return _read(folder)
        # Not every OSError: what cannot be read at the moment must not be deleted for it.
        except (FileNotFoundError, ValueError, KeyError, TypeError) as problem:
            log.warning("%s is not whole (%s): going back to the one before", folder, problem)
            shutil.rmtree(folder)
    return None


def at(work: Path, step: int) -> Checkpoint:
    """The checkpoint after `step` steps, which another process has found whole."""
    return _read(_folder(work, step))


def _read(folder: Path) -> Checkpoint:
    record = json.loads((folder / RECORD).read_text())
    if file_digest(folder / TENSORS) != record["sha256"]:
        raise ValueError("checksum differs")
    return Checkpoint(int(record["step"]), load_state(folder / TENSORS), record)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> State:
    """The optimizer's per-parameter tensors as `<parameter index>/<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: State) -> None:
    """The inverse of `flatten_optimizer`; settings (learning rate, betas) stay those of the optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = _as_it_was(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _as_it_was(value: torch.Tensor, parameter: torch.Tensor) -> Any:
    if value.ndim == 0 and not value.is_floating_point():
        return value.item()  # a count, which bitsandbytes keeps as a number
    if value.shape == parameter.shape and value.stride() != parameter.stride():  # which a fused step refuses
        return torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
    return value


def _folder(work: Path, step: int) -> Path:
    return work / f"checkpoint-{step:08d}"


def _folders(work: Path) -> list[Path]:
    return sorted(work.glob("checkpoint-*"))
