"""Train, search and report splits by pixel hash, before augmentation: equal images fall into one split, everywhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from deme_diffusion.config import DataSettings
from deme_diffusion.data.augment import augmented
from deme_diffusion.data.sources import Pixels, Source, SplitName, open_source
from deme_diffusion.errors import UserError


def split_of(pixels: Pixels, settings: DataSettings) -> SplitName:
    """The split of one image: its hash as a fraction of [0, 1), report first, then search, the rest trains."""
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    if fraction < settings.report_fraction:
        return "report"
    return "search" if fraction < settings.report_fraction + settings.search_fraction else "train"


def to_model_range(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, c) -> float32 (n, c, h, w) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """float (n, c, h, w) in [-1, 1] -> uint8 (n, h, w, c), rounded and clipped: the one way images are quantised."""
    levels = images.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
    return np.asarray(levels.permute(0, 2, 3, 1).cpu().numpy())


@dataclass(frozen=True)
class Split:
    """One split of a source: `indices` into the source, in the source's order."""

    name: SplitName
    source: Source
    indices: list[int]
    settings: DataSettings

    def __len__(self) -> int:
        return len(self.indices)

    def images(self, positions: list[int]) -> torch.Tensor:
        """float32 (b, c, h, w) in [-1, 1], unaugmented, for positions within this split."""
        return to_model_range(np.stack([self.source.pixels(self.indices[p]) for p in positions]))

    def labels(self, positions: list[int]) -> torch.Tensor:
        """int64 (b,). Raises UserError when the source has no labels."""
        labels = [self.source.label(self.indices[p]) for p in positions]
        if any(label is None for label in labels):
            raise UserError(f"data.source {self.settings.source}: its images have no labels")
        return torch.tensor(labels)

    def view(self, view: int) -> torch.Tensor:
        """Every image once, (n, c, h, w): as it is when `data.views` is 1, else augmented, keyed by (view, image)."""
        images = self.images(list(range(len(self))))
        if self.settings.views == 1:
            return images
        return augmented(images, self.settings.augment, seed=0, purpose=f"view-{self.name}", step=view, first=0)

    def views(self) -> torch.Tensor:
        """All views of all images, (n * views, c, h, w): what held-out statistics are taken on."""
        return torch.cat([self.view(v) for v in range(self.settings.views)])


def load_splits(settings: DataSettings) -> dict[SplitName, Split]:
    """The three splits. Raises UserError when one of them is empty."""
    source = open_source(settings)
    indices: dict[SplitName, list[int]] = {"train": [], "search": [], "report": []}
    for index in range(len(source)):
        indices[split_of(source.pixels(index), settings)].append(index)
    for name, members in indices.items():
        if not members:
            raise UserError(f"data: the {name} split is empty; raise data.{name}_fraction or bring more images")
    return {name: Split(name, source, members, settings) for name, members in indices.items()}
