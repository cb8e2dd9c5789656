"""Makes a cache: the latents of all views of the three splits, and the embedding of each distinct caption, once.

Shard by shard, each written whole: an attempt that was killed goes on after the last one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset

from deme_diffusion.config import CacheSettings
from deme_diffusion.data.encoded import CAPTION, LATENT, RECORD, caption_digest
from deme_diffusion.data.loading import leave_signals_to_the_parent
from deme_diffusion.data.sources import SplitName
from deme_diffusion.data.splits import Split
from deme_diffusion.errors import UserError
from deme_diffusion.files import file_digest, require_space, write_json
from deme_diffusion.weights import State, save_state

log = logging.getLogger(__name__)
TEXT = "text"
"""The part that is no split's latents."""
ROWS = "rows"
"""In the metadata of a shard: which rows of its part it holds."""
CUT = "cut"
"""In the metadata of a shard: how many of its captions the tokenizer cuts."""
LOOKED_AT, AT_ONCE = 10_000, 256
"""Captions that are counted at most where there is no cache, and at a time."""
MOST_ROWS = 8192
"""Rows of a shard at most, which is what a kill may cost."""
TOLD_EVERY = 10.0
"""Seconds between two lines of progress."""
Encode = Callable[[int, int], Iterator[tuple[State, int]]]


class Encoder(Protocol):
    """A latent model, as `models.latent.LatentDenoiser`."""

    @property
    def sample_shape(self) -> tuple[int, ...]: ...

    def encode_images(self, images: torch.Tensor) -> torch.Tensor: ...

    def encode_captions(self, captions: Sequence[str]) -> State: ...

    def placeholder(self, count: int) -> State: ...

    def truncated(self, captions: Sequence[str]) -> list[bool]: ...


@dataclass(frozen=True)
class Part:
    """Rows stored alike: a split's latents, view after view, or the text.

    `encode` gives rows [start, stop) in batches, each with the number of its captions that were cut.
    """

    name: str
    rows: int
    row_bytes: int
    encode: Encode

    def shards(self, most_bytes: int, batch_size: int) -> list[Shard]:
        """Its shards, of whole batches."""
        fit = min(MOST_ROWS, most_bytes // self.row_bytes) // batch_size * batch_size or batch_size
        kind = TEXT if self.name == TEXT else f"latents-{self.name}"
        spans = [(start, min(start + fit, self.rows)) for start in range(0, self.rows, fit)]
        return [Shard(self, f"{kind}-{i:05d}.safetensors", *span) for i, span in enumerate(spans)]


@dataclass(frozen=True)
class Shard:
    """A file with rows [start, stop) of a part."""

    part: Part
    name: str
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """Of its rows."""
        return (self.stop - self.start) * self.part.row_bytes

    def is_in(self, folder: Path) -> bool:
        """Whether an earlier attempt wrote it, with the same rows."""
        return self._told(folder).get(ROWS) == f"{self.start}-{self.stop}"

    def cut(self, folder: Path) -> int:
        """How many captions the tokenizer cut, of a shard that is written."""
        return int(self._told(folder).get(CUT, 0))

    def _told(self, folder: Path) -> dict[str, str]:
        try:
            with safe_open(folder / self.name, framework="pt") as opened:
                return dict(opened.metadata() or {})
        except (SafetensorError, OSError):
            return {}

    def ensure(self, folder: Path, dtype: str, progress: Progress) -> None:
        """Encode its rows, and write them in one go, unless they are there."""
        if self.is_in(folder):
            return
        batches, cut = [], 0
        for batch, shortened in self.part.encode(self.start, self.stop):
            batches.append({key: _stored(value, dtype) for key, value in batch.items()})
            cut += shortened
            progress.add(len(next(iter(batch.values()))))
        state = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        save_state(folder / self.name, state, {ROWS: f"{self.start}-{self.stop}", CUT: str(cut)})

    def entry(self, folder: Path) -> dict[str, Any]:
        """Its line in `cache.json`."""
        file = folder / self.name
        told = {"part": self.part.name, "rows": self.stop - self.start}
        return {**told, "bytes": file.stat().st_size, "sha256": file_digest(file)}


def make_cache(
    folder: Path,
    splits: Mapping[SplitName, Split],
    encoder: Encoder,
    settings: CacheSettings,
    *,
    made_of: Mapping[str, Any],
    views: Mapping[SplitName, int],
    most_bytes: int,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """Fill a folder, going on from the shards in it. Returns the results: counts, and bytes.

    `made_of`: what the cache is known by; `views` of each image of a split; `most_bytes` of a shard; images are encoded
    on `device`. Raises MachineError where the disk is too small, UserError for what overflows in `cache.dtype`.
    """
    captions = distinct_captions(splits) if splits["train"].carries == "text" else []
    images = _Encoding(encoder, settings, torch.device(device), workers)
    # Text first: what is wrong with captions is seen before hours of images.
    parts = [_text(captions, encoder, settings)] if captions else []
    parts += [images.of_split(split, views[name]) for name, split in splits.items()]
    shards = [shard for part in parts for shard in part.shards(most_bytes, settings.batch_size)]
    left = [shard for shard in shards if not shard.is_in(folder)]
    _say_size(parts, folder)
    require_space(folder, sum(shard.bytes for shard in left))
    progress = Progress(sum(shard.stop - shard.start for shard in left))
    spoken, seen = ([shard for shard in shards if (shard.part.name == TEXT) is text] for text in (True, False))
    for shard in spoken:
        shard.ensure(folder, settings.dtype, progress)
    _say_cut(cut := sum(shard.cut(folder) for shard in spoken), f"{len(captions):,} captions")
    for shard in seen:
        shard.ensure(folder, settings.dtype, progress)
    for stale in {file.name for file in folder.glob("*.safetensors")} - {shard.name for shard in shards}:
        (folder / stale).unlink()  # of an attempt with other sizes of shards
    counts = {"latents": sum(part.rows for part in parts if part.name != TEXT), "captions": len(captions), "cut": cut}
    record = {"made_of": dict(made_of), "views": dict(views), **counts}
    record["condition"] = list(encoder.placeholder(1)) if captions else []
    write_json(folder / RECORD, {**record, "shards": {shard.name: shard.entry(folder) for shard in shards}})
    return {**counts, "bytes": sum(shard.bytes for shard in shards)}


def distinct_captions(splits: Mapping[SplitName, Split]) -> list[str]:
    """Every caption of the splits' images once, and '', in the order of their digests."""
    found = {caption for split in splits.values() for i in split.indices for caption in split.source.captions(i)}
    return sorted({*found, ""}, key=caption_digest)


def say_cut(encoder: Encoder, splits: Mapping[SplitName, Split]) -> int:
    """Count, and tell, the training captions that the tokenizer cuts: of those of a run without a cache the first."""
    train = splits["train"]
    each = (caption for i in train.indices for caption in train.source.captions(i))
    captions = list(islice(each, LOOKED_AT + 1))
    first, captions = "the first " if len(captions) > LOOKED_AT else "", captions[:LOOKED_AT]
    batches = (captions[start : start + AT_ONCE] for start in range(0, len(captions), AT_ONCE))
    cut = sum(sum(encoder.truncated(batch)) for batch in batches)
    _say_cut(cut, f"{first}{len(captions):,} training captions")
    return cut


def _say_cut(cut: int, of: str) -> None:
    if cut:
        log.warning("captions: %s of %s are longer than the model's tokenizer takes, and are cut", f"{cut:,}", of)


# -- parts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoding:
    """How images become latents."""

    encoder: Encoder
    settings: CacheSettings
    device: torch.device
    workers: int

    def of_split(self, split: Split, views: int) -> Part:
        """All views of a split."""
        row = prod(self.encoder.sample_shape) * _itemsize(self.settings)

        def encode(start: int, stop: int) -> Iterator[tuple[State, int]]:
            batches = _Images(split, start, stop, self.settings.batch_size)
            for images in DataLoader(
                batches,
                batch_size=None,
                num_workers=self.workers,
                worker_init_fn=leave_signals_to_the_parent,
                generator=torch.Generator(),  # or the loader draws from the global one
            ):
                yield {LATENT: self.encoder.encode_images(images.to(self.device))}, 0

        return Part(split.name, len(split) * views, row, encode)


class _Images(Dataset[torch.Tensor]):
    """Item k is the k-th batch of rows [start, stop) of a split's views, view after view, each keyed by its place."""

    def __init__(self, split: Split, start: int, stop: int, batch_size: int) -> None:
        self.split, self.starts, self.stop, self.batch_size = split, range(start, stop, batch_size), stop, batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        first, size = self.starts[index], len(self.split)
        last, images = min(first + self.batch_size, self.stop), []
        for view in range(first // size, (last - 1) // size + 1):
            images.append(self._view(view, max(first - view * size, 0), min(last - view * size, size)))
        return torch.cat(images)

    def _view(self, view: int, start: int, stop: int) -> torch.Tensor:
        """Images [start, stop) in one view: of the train split as training sees them."""
        if self.split.name != "train":
            return self.split.view(view, start, stop)
        return self.split.training_images(range(start, stop), seed=0, purpose="cache", step=view, first=start)


def _text(captions: Sequence[str], encoder: Encoder, settings: CacheSettings) -> Part:
    def encode(start: int, stop: int) -> Iterator[tuple[State, int]]:
        for first in range(start, stop, settings.batch_size):
            some = captions[first : min(first + settings.batch_size, stop)]
            digests = torch.tensor([caption_digest(caption) for caption in some])
            yield {CAPTION: digests, **encoder.encode_captions(some)}, sum(encoder.truncated(some))

    digest, itemsize = torch.int64.itemsize, _itemsize(settings)
    each = [v.numel() * (itemsize if v.is_floating_point() else v.itemsize) for v in encoder.placeholder(1).values()]
    return Part(TEXT, len(captions), digest + sum(each), encode)


def _itemsize(settings: CacheSettings) -> int:
    return int(getattr(torch, settings.dtype).itemsize)


def _stored(value: torch.Tensor, dtype: str) -> torch.Tensor:
    if not value.is_floating_point():
        return value.cpu()
    stored = value.to("cpu", getattr(torch, dtype))
    if not bool(torch.isfinite(stored).all()):
        raise UserError(f"cache.dtype: what is encoded is not finite in {dtype}; use bfloat16 or float32")
    return stored


# -- what is said ---------------------------------------------------------------------------------


def _say_size(parts: Sequence[Part], folder: Path) -> None:
    latents, text = ([part for part in parts if (part.name == TEXT) is spoken] for spoken in (False, True))
    said = [f"{_bytes(latents)} for {sum(part.rows for part in latents):,} latents"]
    said += [f"{_bytes(text)} for {part.rows:,} distinct captions" for part in text]
    log.info("cache: %s, in %s", ", ".join(said), folder)


def _bytes(parts: Sequence[Part]) -> str:
    return f"{sum(part.rows * part.row_bytes for part in parts) / 1e6:,.1f} MB"


class Progress:
    """Says from time to time how many rows are encoded."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.last = total, 0, time.monotonic()

    def add(self, rows: int) -> None:
        """Count some."""
        self.done += rows
        if time.monotonic() - self.last > TOLD_EVERY:
            self.last = time.monotonic()
            log.info("cache: %d of %d encoded", self.done, self.total)
