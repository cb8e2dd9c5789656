"""Safetensors on disk: a lazy reader over single or sharded files, a streaming writer, and checks. Never a pickle."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.files import forget, replacing
from deme_diffusion.weight_files import PICKLES as PICKLES
from deme_diffusion.weight_files import WEIGHTS_NAME as WEIGHTS_NAME
from deme_diffusion.weight_files import index_of, pickled, weight_files, weight_map

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
    """The weight files of a component folder under diffusers' default names, which it loads without being told more.

    Raises UserError for a missing folder, shard, or a pickle instead.
    """
    return weight_files(folder, others=False)


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes lie: `start` and `nbytes` in a file."""

    file: Path
    stored: str
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class Weights:
    """Lazy, memory-mapped tensors of a component folder or a safetensors file; a `with` closes the files.

    Names are those that `from_pretrained` gives, also where a file has diffusers' old attention names. Raises
    UserError at opening when a file is truncated, pickled or missing, or when an index and its shards disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = weight_files(path) if path.is_dir() else [path]
        self._stack = ExitStack()
        self._handles = {file: self._stack.enter_context(_opened(file)) for file in self.files}
        found = [entry for file in self.files for entry in _entries(file)]
        self._check_index(found)
        modern = _modern_names({entry.stored for entry in found})
        self._entries: dict[str, Entry] = {}
        for entry in found:
            if (first := self._entries.setdefault(modern[entry.stored], entry)) is not entry:
                raise UserError(
                    f"{entry.file}: {entry.stored} and {first.stored} ({first.file.name}) are one tensor, "
                    f"{modern[entry.stored]}; keep one of the two"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _check_index(self, found: list[Entry]) -> None:
        index = index_of(self.path) if self.path.is_dir() else None
        if index is None:
            return
        said, have = weight_map(index), {entry.stored: entry.file.name for entry in found}
        for key in sorted(said.keys() | have.keys()):
            if said.get(key) != have.get(key):
                where = f"lies in {have[key]}" if key in have else "is in none of them"
                raise UserError(f"{index}: does not agree with the shards: {key} {where}; fetch or make it again")

    def keys(self) -> list[str]:
        """Tensor names, in the order of the files."""
        return list(self._entries)

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, read now."""
        entry = self._entries[key]
        tensor: torch.Tensor = self._handles[entry.file].get_tensor(entry.stored)
        return tensor

    def entry(self, key: str) -> Entry:
        """Where one tensor's bytes lie."""
        return self._entries[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape, without reading the tensor."""
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Dtype, without reading the tensor. Raises UserError for one that we cannot write again."""
        entry = self._entries[key]
        if entry.dtype not in _DTYPES:
            raise UserError(f"{entry.file}: {key} is {entry.dtype}, a dtype that is not supported")
        return _DTYPES[entry.dtype]

    def layout(self) -> dict[str, list[str]]:
        """File name -> its keys as they follow each other: a merged model is sharded like its base."""
        files: dict[str, list[str]] = {file.name: [] for file in self.files}
        for key, entry in sorted(self._entries.items(), key=lambda item: (item[1].start, item[0])):
            files[entry.file.name].append(key)
        return files


def _entries(file: Path) -> list[Entry]:
    """The header's, by name; the file was opened before, so it is whole."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return [
        Entry(file, key, 8 + length + begin, end - begin, value["dtype"], tuple(value["shape"]))
        for key, value in sorted(header.items())
        for begin, end in [value["data_offsets"]]
    ]


def modern_name(key: str) -> str:
    """diffusers' old attention names (query, key, value, proj_attn) as `from_pretrained` renames them."""
    return _OLD_ATTENTION.sub(lambda found: f".{_ATTENTION[found[1]]}.{found[2]}", key)


def _modern_names(stored: Collection[str]) -> dict[str, str]:
    """Stored -> modern name; only beside an old `proj_attn.weight`: other models' `query` is no diffusers attention."""
    old = {key[: -len(".proj_attn.weight")] for key in stored if key.endswith(".proj_attn.weight")}
    return {key: modern_name(key) if key.rsplit(".", 2)[0] in old else key for key in stored}


def _opened(file: Path) -> Any:
    if file.suffix in PICKLES:
        raise pickled(file)
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
        if (ours_is := base.shape(key)) != (theirs_is := other.shape(key)):
            raise UserError(
                f"{other.path}: {key} has shape {theirs_is}, {base.path} has {ours_is}{_pointwise(ours_is, theirs_is)}"
            )


def _pointwise(one: tuple[int, ...], other: tuple[int, ...]) -> str:
    """Said of two shapes that differ by trailing ones: diffusers loads neither for the other."""
    short, long = sorted((one, other), key=len)
    same = len(short) == 2 and long == (*short, 1, 1)
    return "; one has 1x1 convolutions where the other has linear layers: convert it first" if same else ""


def stored_order(header: Header) -> list[str]:
    """The order in which a file holds its tensors: wide elements first."""
    # Without holes, as the format wants it, only so is every tensor aligned to its own elements.
    return sorted(header, key=lambda key: -header[key][0].itemsize)


class StreamWriter:
    """Writes one safetensors file tensor by tensor: the header first, from the shapes, then the data as `keys` says.

    `header`: key -> (dtype, shape). Use `stream_to`, which leaves no half file.
    """

    def __init__(self, file: BinaryIO, header: Header, metadata: Mapping[str, str]) -> None:
        self.keys = stored_order(header)
        self._file, self._header, self._written, self._of_key = file, header, 0, 0
        self._handed = 0
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
        if (tensor.dtype, tuple(tensor.shape)) != self._header.get(key, (tensor.dtype, tuple(tensor.shape))):
            raise ValueError(f"{key}: {tensor.dtype} {tuple(tensor.shape)}, announced as {self._header[key]}")
        self.write_part(key, tensor)

    def write_part(self, key: str, part: torch.Tensor) -> None:
        """Append the next entries of a tensor, in its order; raises ValueError out of order, or for another dtype."""
        if self.keys[self._written : self._written + 1] != [key]:
            raise ValueError(f"{key}: written out of order")
        dtype, shape = self._header[key]
        self._of_key += part.numel()
        if part.dtype != dtype or self._of_key > prod(shape):
            raise ValueError(f"{key}: {part.numel()} entries of {part.dtype}, announced as {self._header[key]}")
        self._file.write(tensor_bytes(part))
        if self._of_key == prod(shape):
            self._written, self._of_key = self._written + 1, 0

    @property
    def complete(self) -> bool:
        """Whether every tensor is written."""
        return self._written == len(self.keys)

    def hand_over(self, block: int) -> None:
        """Let the disk begin with what was written, `block` bytes at a time: a sync at the end then waits less."""
        if (stop := self._file.tell()) - self._handed >= block:
            # The block before this one is on the disk by now, and its pages are let go of.
            start = max(0, self._handed - block)
            forget(self._file, start, stop - start)
            self._handed = stop

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
        update_digest(digest, key, tensor)
    return digest.hexdigest()


def update_digest(digest: Any, key: str, tensor: torch.Tensor) -> None:
    """One tensor's turn in `state_digest`."""
    digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bits of a tensor, without a copy where it lies in one piece."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
