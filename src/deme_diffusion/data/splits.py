"""Train, search and report splits by pixel hash, before augmentation: equal images fall into one split, everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from deme_diffusion.config import DataSettings
from deme_diffusion.data.augment import augmented
from deme_diffusion.data.sources import Digits, Pixels, Source, SplitName
from deme_diffusion.errors import UserError
from deme_diffusion.rng import generator, uniforms

SPLITS: tuple[SplitName, ...] = ("train", "search", "report")
Carries = Literal["nothing", "class", "text"]


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
    """One split of a source: `indices` into the source, in an order that does not follow classes.

    `carries`: what its batches hold beside images, as the model takes it (`Denoiser.takes`). `classes`: of each label
    the model's class, which a batch holds in its place.
    """

    name: SplitName
    source: Source
    indices: Sequence[int]
    settings: DataSettings
    carries: Carries = "nothing"
    classes: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w) of an image as training sees it."""
        return tuple(self.images([0]).shape[1:])

    def images(self, positions: Sequence[int]) -> torch.Tensor:
        """float32 (b, c, h, w) in [-1, 1], unaugmented, for positions within this split."""
        return to_model_range(np.stack([self._square(p, 0.5, 0.5) for p in positions]))

    def training_images(
        self, positions: Sequence[int], *, seed: int, purpose: str, step: int, first: int
    ) -> torch.Tensor:
        """`images`, cropped at random and augmented as the settings say; sample i is keyed by first + i."""
        if self.settings.crop == "random":
            draws = uniforms(seed, f"crop {purpose}", step, first, len(positions), each=2)
            images = to_model_range(np.stack([self._square(p, *uv) for p, uv in zip(positions, draws, strict=True)]))
        else:
            images = self.images(positions)
        return augmented(images, self.settings.augment, seed=seed, purpose=purpose, step=step, first=first)

    def training_batch(
        self, positions: Sequence[int], *, seed: int, purpose: str, step: int, first: int, empty: float = 0.0
    ) -> dict[str, Any]:
        """`image` as `training_images`, and `caption` or `label`: one of an image's captions, or with the probability
        `empty` none ('' or -1), for classifier-free guidance. Each draw is keyed by first + i."""
        keyed: dict[str, Any] = {"seed": seed, "purpose": purpose, "step": step, "first": first}
        images = self.training_images(positions, **keyed)
        return {"image": images, **self.training_prompts(positions, **keyed, empty=empty)}

    def training_prompts(
        self, positions: Sequence[int], *, seed: int, purpose: str, step: int, first: int, empty: float = 0.0
    ) -> dict[str, Any]:
        """`caption` or `label` of `training_batch`; nothing where the model takes neither."""
        if self.carries == "nothing":
            return {}
        draws = uniforms(seed, f"prompt {purpose}", step, first, len(positions), each=2)
        return self.prompts(positions, draws[:, 0], dropped=draws[:, 1] < empty)

    def view_batch(self, view: int, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """`image` as `view`, and `caption` or `label`: each view has the next of an image's captions."""
        images = self.view(view % self.settings.views, start, stop)
        return {"image": images, **self.view_prompts(view, start, stop)}

    def view_prompts(self, view: int, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """`caption` or `label` of `view_batch`; nothing where the model takes neither."""
        return {} if self.carries == "nothing" else self.prompts(range(len(self))[start:stop], view)

    def prompts(
        self, positions: Sequence[int], which: int | np.ndarray, dropped: np.ndarray | None = None
    ) -> dict[str, Any]:
        """`caption` (b strings) or `label` (b,): the caption by number, or by draws in [0, 1); none where `dropped`."""
        gone = np.zeros(len(positions), bool) if dropped is None else dropped
        if self.carries == "class":
            labels = self.labels(positions)
            labels = labels if self.classes is None else torch.from_numpy(self.classes)[labels]
            return {"label": torch.where(torch.from_numpy(gone), -1, labels)}
        numbers = [which if isinstance(which, int) else float(which[i]) for i in range(len(positions))]
        captions = [self.caption(p, number) for p, number in zip(positions, numbers, strict=True)]
        return {"caption": ["" if gone[i] else caption for i, caption in enumerate(captions)]}

    def caption(self, position: int, which: int | float) -> str:
        """One caption of an image: by number, counted round, or by a draw in [0, 1). Raises UserError without any."""
        captions = self.source.captions(self.indices[position])
        if not captions and self.settings.missing_captions == "empty":
            return ""
        if not captions:
            where = f" {self.settings.path}" if self.settings.path else ""
            raise UserError(
                f"data.source {self.settings.source}{where}: its images have no captions (data.caption_column)"
            )
        return captions[which % len(captions) if isinstance(which, int) else int(which * len(captions))]

    def _square(self, position: int, u: float, v: float) -> Pixels:
        """One image, cropped to `data.resolution` where it is longer; (u, v) in [0, 1) place the crop."""
        pixels, side = self.source.pixels(self.indices[position]), self.settings.resolution
        height, width = pixels.shape[:2]
        if side is None or height == width == side:
            return pixels
        top, left = int(u * (height - side + 1)), int(v * (width - side + 1))
        return pixels[top : top + side, left : left + side]

    def labels(self, positions: Sequence[int]) -> torch.Tensor:
        """int64 (b,), 0, 1, ... without gaps. Raises UserError when the source has no labels."""
        labels = [self.source.label(self.indices[p]) for p in positions]
        if any(label is None for label in labels):
            where = f" {self.settings.path}" if self.settings.path else ""
            raise UserError(f"data.source {self.settings.source}{where}: its images have no labels (data.label_column)")
        return torch.tensor(labels)

    def view(self, view: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Images [start, stop) once, (n, c, h, w): as they are when `data.views` is 1, else augmented by (view, i)."""
        images = self.images(range(len(self))[start:stop])
        if self.settings.views == 1:
            return images
        return augmented(images, self.settings.augment, seed=0, purpose=f"view-{self.name}", step=view, first=start)

    def views(self, batch_size: int = 1024) -> Iterator[torch.Tensor]:
        """All views of all images in batches (b, c, h, w), view after view: what held-out statistics are taken on."""
        for view in range(self.settings.views):
            for start in range(0, len(self), batch_size):
                yield self.view(view, start, min(start + batch_size, len(self)))


def load_splits(
    settings: DataSettings, folder: Path | None = None, commit: str | None = None
) -> dict[SplitName, Split]:
    """The three splits; all sources but the embedded one are read from the index in `folder`.

    Raises UserError when one of them is empty.
    """
    source, members = _members(settings, folder, commit)
    for name, indices in members.items():
        if not indices:
            share = "lower data.report_fraction" if name == "train" else f"raise data.{name}_fraction"
            raise UserError(f"data: the {name} split is empty; {share} or bring more images")
    return {name: Split(name, source, indices, settings) for name, indices in members.items()}


def _members(
    settings: DataSettings, folder: Path | None, commit: str | None
) -> tuple[Source, dict[SplitName, list[int]]]:
    members: dict[SplitName, list[int]] = {name: [] for name in SPLITS}
    if folder is None:
        assert settings.source == "digits", "all other sources are indexed first"
        source: Source = Digits()
        chosen = generator(0, "max_images").permutation(len(source))[: settings.max_images or len(source)]
        for index in sorted(int(i) for i in chosen):
            members[split_of(source.pixels(index), settings)].append(index)
        return source, members
    from deme_diffusion.data.index import Indexed

    indexed = Indexed(settings, folder, commit)
    # Shuffled once: folders list images by class, and many a measure takes the first so many of a split.
    order = generator(0, "splits").permutation(len(indexed))
    return indexed, {name: order[indexed.split[order] == i].tolist() for i, name in enumerate(SPLITS)}
