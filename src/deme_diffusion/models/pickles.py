"""State dicts that others saved with `torch.save`, read as plain tensors; whatever holds code is refused, never run."""

from __future__ import annotations

import re
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deme_diffusion.errors import MachineError, UserError
from deme_diffusion.files import explained
from deme_diffusion.weights import PICKLES, State, load_state, modern_name

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "unet", "ema")
"""Under which keys training scripts put a state dict, the likeliest first."""
PREFIXES = ("module.", "_orig_mod.", "model.", "unet.")
"""What DDP, torch.compile and trainers put before every name."""
_PICKLE, _ZIP = b"\x80", b"PK"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, before torch 1.6
_NEEDS_CODE = re.compile(r"GLOBAL ([\w.]+)|TorchScript")


def read_state(file: Path) -> tuple[State, list[str]]:
    """The tensors of a .safetensors file or of a pickled state dict (memory-mapped where it can be), and what was
    unwrapped to get at them. Raises UserError for a missing or broken file, for a pickle of more than tensors."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        state, said = load_state(file), list[str]()
    elif file.suffix in PICKLES:
        state, said = _unwrapped(_unpickled(file), file)
    else:
        raise UserError(f"{file}: a checkpoint ends in .safetensors, {', '.join(PICKLES[:-1])} or {PICKLES[-1]}")
    return _without_prefix(state, said)


def plain_state(file: Path, *, modern: bool) -> State | None:
    """The state dict in a pickle, with `modern` under today's attention names; None where there is anything else."""
    try:
        value = _unpickled(file)
    except UserError:
        return None
    if not isinstance(value, Mapping) or not _is_state(value):
        return None
    return {modern_name(key) if modern else key: tensor for key, tensor in value.items()}


def _unpickled(file: Path) -> Any:
    try:
        with explained("read", file), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what is refused below
            # Only zip archives, which torch writes since 1.6, can be mapped.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (MachineError, MemoryError):
        raise
    except Exception as error:  # broken bytes raise a dozen kinds
        raise _refused(file, error) from None


def _refused(file: Path, error: Exception) -> UserError:
    with file.open("rb") as opened:
        head = opened.read(len(_LEGACY))
    if head[:1] == _PICKLE and head != _LEGACY:  # other programs' pickles, whose code torch does not always name
        what = "a pickle that torch.save did not write"
        load = "import sys, pickle, torch; m = pickle.load(open(sys.argv[1], 'rb')); "
    elif found := _NEEDS_CODE.search(str(error)):
        what = f"a pickle of code ({found[1] or 'TorchScript'})"
        load = "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); "
    else:
        return UserError(f"{file}: not a whole torch checkpoint ({_reason(head, error)}); fetch or make it again")
    save = "torch.save(getattr(m, 'state_dict', lambda: m)(), sys.argv[2])"
    names = shlex.quote(str(file)), shlex.quote(str(file.with_name(f"{file.stem}-state.bin")))
    return UserError(
        f"{file}: {what}, whose code is never run; if you trust it, run where the code that wrote it is installed: "
        f'python -c "{load}{save}" {names[0]} {names[1]}, then deme convert {names[1]}'
    )


def _reason(head: bytes, error: Exception) -> str:
    if not head:
        return "it is empty"
    if head[:1] != _PICKLE and not head.startswith(_ZIP):
        return "neither a zip archive nor a pickle"
    said = str(error).strip().split("\n")[0].split(". ")[0]
    return said[:100] if " " in said else f"{type(error).__name__} {said}".strip()


def _unwrapped(value: Any, file: Path) -> tuple[State, list[str]]:
    """The state dict inside the usual wrappers, each of which is told."""
    said: list[str] = []
    while isinstance(value, Mapping) and not _is_state(value):
        inside = [key for key in WRAPPERS if isinstance(value.get(key), Mapping) and value[key]]
        if not inside:
            break
        said.append(f"took {inside[0]!r}{''.join(f', not {other!r}' for other in inside[1:])}")
        value = value[inside[0]]
    if not isinstance(value, Mapping) or not _is_state(value):
        what = f"keys {', '.join(map(str, list(value)[:4]))}" if isinstance(value, Mapping) else type(value).__name__
        raise UserError(f"{file}: no state dict (found: {what}); names with a tensor each are expected")
    return dict(value), said


def _is_state(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())


def _without_prefix(state: State, said: list[str]) -> tuple[State, list[str]]:
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            shorter = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
            return _without_prefix(shorter, [*said, f"dropped {prefix!r} before every name"])
    return state, said
