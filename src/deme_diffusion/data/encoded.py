"""Latents and text embeddings that were made once (`data.encoding`): what trainings read in place of images.

A cache is a folder of safetensors shards with `cache.json`, which says what it was made of and vouches for each shard.
Shards are mapped into memory, and rows are read from them when a batch asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from deme_diffusion.config import DataSettings
from deme_diffusion.data.sources import SplitName
from deme_diffusion.data.splits import Split
from deme_diffusion.digests import known
from deme_diffusion.errors import UserError
from deme_diffusion.rng import uniforms
from deme_diffusion.weight_files import read_json

RECORD = "cache.json"
AGAIN = "copy it again, or make the cache anew with deme cache and cache.folder=null"
LATENT, CAPTION = "latent", "caption"
"""Tensors in the shards: latents (rows, ...); digests of captions (rows,) beside their embeddings."""
Numbers = npt.NDArray[np.int64]


def caption_digest(caption: str) -> int:
    """What a caption is found by in a cache: 64 bits, signed."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little", signed=True)


class Rows:
    """One tensor by its rows, over the shards of a cache; each process maps the files it reads from anew."""

    def __init__(self, shards: Sequence[tuple[Path, int]], name: str) -> None:
        self.files, self.name = [file for file, _ in shards], name
        self.stops = np.cumsum([rows for _, rows in shards])
        self._mapped: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return int(self.stops[-1]) if len(self.stops) else 0

    def __call__(self, rows: Numbers) -> torch.Tensor:
        """(len(rows), ...) as they are stored. Raises UserError where a shard is no whole file any more."""
        shards = np.searchsorted(self.stops, rows, side="right")
        found: torch.Tensor | None = None
        for shard in np.unique(shards):
            at = np.flatnonzero(shards == shard)
            start = self.stops[shard - 1] if shard else 0
            part = self._tensor(int(shard))[torch.from_numpy(rows[at] - start)]
            found = part.new_empty((len(rows), *part.shape[1:])) if found is None else found
            found[torch.from_numpy(at)] = part
        assert found is not None, "a batch has rows"
        return found

    def all(self) -> torch.Tensor:
        """All rows, in memory."""
        return torch.cat([self._tensor(shard) for shard in range(len(self.files))])

    def _tensor(self, shard: int) -> torch.Tensor:
        if shard not in self._mapped:
            file = self.files[shard]
            try:
                with safe_open(file, framework="pt") as opened:
                    self._mapped[shard] = opened.get_tensor(self.name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a whole shard of a cache ({error}); {AGAIN}") from None
        return self._mapped[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}


class Text:
    """The embeddings of every distinct caption, and of '', found by the caption's digest."""

    def __init__(self, shards: Sequence[tuple[Path, int]], names: Sequence[str]) -> None:
        self.digests = Rows(shards, CAPTION).all().numpy()
        self.embeddings = {name: Rows(shards, name) for name in names}

    def __call__(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the model takes as condition, each (len(captions), ...), as it is stored."""
        wanted = np.array([caption_digest(caption) for caption in captions], np.int64)
        rows = np.searchsorted(self.digests, wanted).clip(max=len(self.digests) - 1)
        assert (self.digests[rows] == wanted).all(), "a cache holds every caption of its splits"
        return {name: embedding(rows) for name, embedding in self.embeddings.items()}


@dataclass(frozen=True)
class EncodedSplit:
    """One split's latents, with the embeddings of its captions (`text`) or, of a model that takes classes, its labels.

    `views`: of each image, stored view after view.
    """

    split: Split
    latents: Rows
    views: int
    text: Text | None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def name(self) -> SplitName:
        """Name of the split."""
        return self.split.name

    @property
    def settings(self) -> DataSettings:
        """As of its images."""
        return self.split.settings

    @property
    def indices(self) -> Sequence[int]:
        """Its images in the source."""
        return self.split.indices

    def training_batch(
        self, positions: Sequence[int], *, seed: int, purpose: str, step: int, first: int, empty: float = 0.0
    ) -> dict[str, Any]:
        """`latent` float32 (b, ...), and `condition` or `label`: of `Split.training_batch` the same captions and drops.

        Of several stored views each sample draws one, keyed by first + i.
        """
        keyed: dict[str, Any] = {"seed": seed, "purpose": purpose, "step": step, "first": first}
        rows = np.array(positions, np.int64)
        if self.views > 1:
            draws = uniforms(seed, f"stored view {purpose}", step, first, len(rows))[:, 0]
            rows += len(self) * (draws * self.views).astype(np.int64)
        return self._batch(rows, self.split.training_prompts(positions, **keyed, empty=empty))

    def view_batch(self, view: int, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """The same of a stored view, with the captions of `Split.view_batch`."""
        rows = np.arange(len(self), dtype=np.int64)[start:stop] + view % self.views * len(self)
        return self._batch(rows, self.split.view_prompts(view, start, stop))

    def _batch(self, rows: Numbers, prompts: Mapping[str, Any]) -> dict[str, Any]:
        latent = {"latent": self.latents(rows).float()}
        return {**latent, "condition": self.text(prompts["caption"])} if self.text else {**latent, **prompts}


def open_cache(folder: Path, splits: Mapping[SplitName, Split]) -> dict[SplitName, EncodedSplit]:
    """The splits as a cache holds them. Raises UserError where its files are not those that `cache.json` lists."""
    record = read_json(folder / RECORD)
    text = Text(_shards(folder, record, "text"), record["condition"]) if record["condition"] else None
    return {
        name: EncodedSplit(split, Rows(_shards(folder, record, name), LATENT), record["views"][name], text)
        for name, split in splits.items()
    }


def check_shards(folder: Path) -> None:
    """Raises UserError for a shard that is not as `cache.json` has it; checksums are remembered by size and time."""
    for name, entry in read_json(folder / RECORD)["shards"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise UserError(f"{file}: missing or cut short; {AGAIN}")
        if known([file], full_hash=True).digest != entry["sha256"]:
            raise UserError(f"{file}: damaged, its checksum is not the one in {RECORD}; {AGAIN}")


def _shards(folder: Path, record: Mapping[str, Any], part: str) -> list[tuple[Path, int]]:
    return [(folder / name, entry["rows"]) for name, entry in record["shards"].items() if entry["part"] == part]
