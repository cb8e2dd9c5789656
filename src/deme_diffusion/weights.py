"""Safetensors on disk: a lazy reader over single or sharded files, a streaming writer, and checks. Never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from deme_diffusion.errors import UserError, nearest

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
State = dict[str, torch.Tensor]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def check_component(folder: Path) -> list[Path]:
    """The weight files of a component folder. Raises UserError for a missing folder, shard, or a pickle instead."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; a diffusers component folder is expected")
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [WEIGHTS_NAME]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickles = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
        if pickles:
            raise UserError(
                f"{folder / pickles[0]}: a pickle, which is never loaded; convert it to {WEIGHTS_NAME} first"
            )
        raise UserError(f"{folder / missing[0]}: missing ({len(missing)} of {len(names)} weight files)")
    return [folder / name for name in names]


class Weights:
    """Lazy, memory-mapped tensors of a component folder or a safetensors file; a `with` closes the files.

    Raises UserError at opening when a file is truncated, pickled or missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = check_component(path) if path.is_dir() else [path]
        self._stack = ExitStack()
        self._owner: dict[str, Any] = {}
        self._file: dict[str, Path] = {}
        for file in self.files:
            handle = self._stack.enter_context(_opened(file))
            for key in handle.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                self._owner[key], self._file[key] = handle, file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def keys(self) -> list[str]:
        """Tensor names, in the order of the files."""
        return list(self._owner)

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, read now."""
        tensor: torch.Tensor = self._owner[key].get_tensor(key)
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape, without reading the tensor."""
        return tuple(self._owner[key].get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """Safetensors name of the dtype (`F32`), without reading the tensor."""
        return str(self._owner[key].get_slice(key).get_dtype())

    def layout(self) -> dict[str, list[str]]:
        """File name -> its keys: a merged model is sharded like its base."""
        files: dict[str, list[str]] = {file.name: [] for file in self.files}
        for key, file in self._file.items():
            files[file.name].append(key)
        return files


def _opened(file: Path) -> Any:
    if file.suffix in PICKLES:
        raise UserError(f"{file}: a pickled checkpoint, which is never loaded; convert it to safetensors first")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch or make it again") from None


def check_same_keys(base: Weights, other: Weights) -> None:
    """Raises UserError unless both hold the same keys and shapes: missing keys are never ignored."""
    ours, theirs = set(base.keys()), set(other.keys())
    if ours != theirs:
        missing, extra = sorted(ours - theirs), sorted(theirs - ours)
        listed = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("extra", extra))
            if keys
        )
        hint = nearest(extra[0], missing) if extra and missing else ""
        raise UserError(f"{other.path}: keys differ from {base.path}: {listed}{hint}")
    for key in base.keys():  # noqa: SIM118 - Weights is no mapping
        if base.shape(key) != other.shape(key):
            raise UserError(f"{other.path}: {key} has shape {other.shape(key)}, {base.path} has {base.shape(key)}")


class StreamWriter:
    """Writes one safetensors file tensor by tensor: the header first, from the shapes; then the data in its order.

    `header`: key -> (dtype, shape). Tensors must be `write`n in that order; `close` checks that all were.
    """

    def __init__(
        self, path: Path, header: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
    ) -> None:
        self.path, self._expected = path, list(header)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        offset = 0
        for key, (dtype, shape) in header.items():
            size = torch.empty(0, dtype=dtype).element_size() * int(torch.Size(shape).numel())
            entries[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Append one tensor; raises ValueError out of order."""
        if not self._expected or self._expected.pop(0) != key:
            raise ValueError(f"{key}: written out of order")
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Flush to the disk; raises ValueError when tensors are missing."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._expected:
            raise ValueError(f"{self.path}: {len(self._expected)} tensors were never written")


def save_state(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A state as one safetensors file, written beside and renamed, so that no half file stands under the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in state.items()},
            temporary,
            {"format": "pt", **(metadata or {})},
        )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path) -> State:
    """All tensors of one safetensors file. Raises UserError when it is truncated or a pickle."""
    with _opened(path):
        pass
    return dict(load_file(path))


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bits of a state."""
    digest = hashlib.sha256()
    for key, tensor in _sorted(state):
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sorted(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from sorted(state.items())
