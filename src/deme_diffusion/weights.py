"""Safetensors on disk: a lazy reader over single or sharded files, a streaming writer, and checks. Never a pickle."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.files import replacing

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
State = dict[str, torch.Tensor]
Header = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def check_component(folder: Path) -> list[Path]:
    """The weight files of a component folder. Raises UserError for a missing folder, shard, or a pickle instead."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; a diffusers component folder is expected")
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        names = _shards(index)
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


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not an index of safetensors shards; fetch or make it again") from None


class Weights:
    """Lazy, memory-mapped tensors of a component folder or a safetensors file; a `with` closes the files.

    Names are those that `from_pretrained` gives, also where a file has diffusers' old attention names. Raises
    UserError at opening when a file is truncated, pickled or missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = check_component(path) if path.is_dir() else [path]
        self._stack = ExitStack()
        self._owner: dict[str, Any] = {}
        self._stored: dict[str, str] = {}
        self._file: dict[str, Path] = {}
        for file in self.files:
            handle = self._stack.enter_context(_opened(file))
            for stored in handle.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                key = modern_name(stored)
                self._owner[key], self._stored[key], self._file[key] = handle, stored, file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def keys(self) -> list[str]:
        """Tensor names, in the order of the files."""
        return list(self._owner)

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, read now."""
        tensor: torch.Tensor = self._owner[key].get_tensor(self._stored[key])
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape, without reading the tensor."""
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Dtype, without reading the tensor. Raises UserError for one that we cannot write again."""
        name = str(self._slice(key).get_dtype())
        if name not in _DTYPES:
            raise UserError(f"{self._file[key]}: {key} is {name}, a dtype that is not supported")
        return _DTYPES[name]

    def _slice(self, key: str) -> Any:
        return self._owner[key].get_slice(self._stored[key])

    def layout(self) -> dict[str, list[str]]:
        """File name -> its keys: a merged model is sharded like its base."""
        files: dict[str, list[str]] = {file.name: [] for file in self.files}
        for key, file in self._file.items():
            files[file.name].append(key)
        return files


def modern_name(key: str) -> str:
    """diffusers' old attention names (query, key, value, proj_attn) as `from_pretrained` renames them."""
    return _OLD_ATTENTION.sub(lambda found: f".{_ATTENTION[found[1]]}.{found[2]}", key)


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
    """Writes one safetensors file tensor by tensor: the header first, from the shapes, then the data as `keys` says.

    `header`: key -> (dtype, shape). Use `stream_to`, which leaves no half file.
    """

    def __init__(self, file: BinaryIO, header: Header, metadata: Mapping[str, str]) -> None:
        # Without holes, as the format wants it, only wide elements first keep every tensor aligned to its own.
        self.keys = sorted(header, key=lambda key: -header[key][0].itemsize)
        self._file, self._header, self._written = file, header, 0
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        offset = 0
        for key in self.keys:
            dtype, shape = header[key]
            if dtype not in _NAMES:
                raise ValueError(f"{key}: safetensors has no {dtype}")
            size = dtype.itemsize * prod(shape)
            entries[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Append one tensor; raises ValueError out of order, or when it is not what the header says."""
        if self.keys[self._written : self._written + 1] != [key]:
            raise ValueError(f"{key}: written out of order")
        if (tensor.dtype, tuple(tensor.shape)) != self._header[key]:
            raise ValueError(f"{key}: {tensor.dtype} {tuple(tensor.shape)}, announced as {self._header[key]}")
        self._file.write(_bytes(tensor))
        self._written += 1

    def finish(self) -> None:
        """Raises ValueError when tensors are missing."""
        if self._written < len(self.keys):
            raise ValueError(f"{len(self.keys) - self._written} tensors were never written")


@contextmanager
def stream_to(path: Path, header: Header, metadata: Mapping[str, str]) -> Iterator[StreamWriter]:
    """A StreamWriter whose file becomes `path` when the block ends well; otherwise what was there is kept."""
    with replacing(path) as file:
        writer = StreamWriter(file, header, metadata)
        yield writer
        writer.finish()


def save_state(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A state as one safetensors file; no half file ever stands under the name."""
    header = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}
    with stream_to(path, header, metadata or {}) as writer:
        for key in writer.keys:
            writer.write(key, state[key])


def load_state(path: Path) -> State:
    """All tensors of one safetensors file. Raises UserError when it is truncated or a pickle."""
    with _opened(path):
        pass
    return dict(load_file(path))


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bits of a state."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
