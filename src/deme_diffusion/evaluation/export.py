"""Images in a folder of the user's: PNG files named by seed, or one array; never over other files. No torch."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from deme_diffusion.errors import UserError, nearest
from deme_diffusion.files import write_bytes, write_json, write_npy

Format = Literal["png", "npy"]
Pixels = npt.NDArray[np.uint8]
Prompt = str | int | None
PROTOCOL, SEEDS, IMAGES, GRID = "protocol.json", "seeds.json", "images.npy", "grid.png"
CURSOR = ".sampled.json"
"""How many images of an array are done; hidden, so that what is done with the folder does not see it."""
MAX_SEEDS, LARGEST_SEED = 1_000_000, 2**63 - 1


def parse_seeds(text: str) -> list[int]:
    """`0,1,5-9` -> [0, 1, 5, 6, 7, 8, 9]. Raises UserError for anything else, and for a seed that comes twice."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--seeds {text}: {part.strip()!r} is no seed and no range of seeds, as in 0,1,5-9")
        low, high = int(first), int(last or first)
        if high < low:
            raise UserError(f"--seeds {text}: {part.strip()!r} runs backwards; did you mean '{high}-{low}'?")
        if len(seeds) + high - low >= MAX_SEEDS:
            raise UserError(f"--seeds {text}: more than {MAX_SEEDS:,} seeds; take several folders")
        seeds += range(low, high + 1)
    return check_seeds(seeds, where=f"--seeds {text}")


def check_seeds(seeds: Sequence[int], *, where: str = "seeds") -> list[int]:
    """The seeds. Raises UserError where there are none, one is negative or too large, or one comes twice."""
    wrong = next((seed for seed in seeds if not 0 <= seed <= LARGEST_SEED), None)
    if wrong is not None:
        raise UserError(f"{where}: {wrong} is no seed; 0 to 2**63 - 1 are")
    twice = next((low for low, high in pairwise(sorted(seeds)) if low == high), None)
    if twice is not None:
        raise UserError(f"{where}: {twice} is there twice")
    if not seeds:
        raise UserError(f"{where}: no seed is given")
    return list(seeds)


def short(seeds: Sequence[int]) -> str:
    """The seeds in their order, as `parse_seeds` reads them: `0-1,5-9`."""
    cuts = [i for i in range(1, len(seeds)) if seeds[i] != seeds[i - 1] + 1]
    runs = [seeds[start:stop] for start, stop in pairwise([0, *cuts, len(seeds)])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs if run)


def png(image: Pixels) -> bytes:
    """One image (h, w, 1 or 3) as PNG, every pixel as it is."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(out, "PNG")
    return out.getvalue()


@dataclass(frozen=True)
class ImageFolder:
    """Images of one protocol (model, its digest, sampler). Made again with more seeds, a folder of PNGs grows."""

    path: Path
    format: Format
    protocol: dict[str, Any]

    def check(self, seeds: Sequence[int] | None, prompts: Sequence[Prompt] | None = None) -> None:
        """Raises UserError where images would overwrite, or be mixed with, something else; or where the image of a seed
        is there, asked for by another prompt."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--images {self.path}: a file, where a folder is needed")
        if self.format not in get_args(Format):
            raise UserError(f"--format {self.format}: png or npy{nearest(self.format, get_args(Format))}")
        there = self._there()
        if there is None:
            if self.path.is_dir() and any(not file.name.startswith(".") for file in self.path.iterdir()):
                raise UserError(f"--images {self.path}: holds files that are not ours; give a new or empty folder")
            return
        wanted = {"format": self.format, **self.protocol}
        if seeds and self.format == "npy":  # an array does not grow
            wanted["seeds"] = short(seeds)
        for key, value in wanted.items():
            if there.get(key) != value:
                raise UserError(
                    f"--images {self.path}: holds other images ({key} is {_said(there.get(key))} there, "
                    f"{_said(value)} here); give another folder"
                )
        if seeds and prompts is not None:
            self._prompts(there, seeds, prompts)

    def begin(self, seeds: Sequence[int], prompts: Sequence[Prompt] | None = None) -> None:
        """Check, and note what the images are, before the first of them is written; what each is asked for by too.

        Raises UserError as `check` does.
        """
        self.check(seeds, prompts)
        there = self._there()
        known = list(seeds) if self.format == "npy" else sorted({*_read_seeds(there), *seeds})
        noted = {} if prompts is None else {"prompts": self._prompts(there, seeds, prompts)}
        write_json(self.path / PROTOCOL, {"format": self.format, **self.protocol, "seeds": short(known), **noted})
        if self.format == "npy":
            write_json(self.path / SEEDS, list(seeds))

    def _prompts(
        self, there: dict[str, Any] | None, seeds: Sequence[int], prompts: Sequence[Prompt]
    ) -> dict[str, Prompt]:
        """Seed -> prompt, of those that are there and those that come; an array is its seeds' from its beginning."""
        known: dict[str, Prompt] = dict((there or {}).get("prompts") or {})
        for seed, prompt in zip(seeds, prompts, strict=True):
            before = known.get(str(seed), prompt)
            known[str(seed)] = prompt
            if before != prompt and self.files([seed])[0].exists():
                raise UserError(
                    f"--images {self.path}: the image of seed {seed} is there, asked for by {_said(before)}, "
                    f"here by {_said(prompt)}; give another folder"
                )
        return known

    def file(self, seed: int) -> Path:
        """The PNG of a seed."""
        return self.path / f"seed-{seed:08d}.png"

    def files(self, seeds: Sequence[int]) -> list[Path]:
        """What holds the images of these seeds."""
        return [self.path / IMAGES] if self.format == "npy" else [self.file(seed) for seed in seeds]

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """The seeds that have no PNG yet; each was written whole, or not at all."""
        return [seed for seed in seeds if not self.file(seed).exists()]

    def write(self, seeds: Sequence[int], pixels: Pixels) -> None:
        """PNGs of images (n, h, w, 1 or 3), one a seed."""
        if pixels.shape[3] not in (1, 3):
            raise UserError(f"--format png: images of {pixels.shape[3]} channels, neither grey nor RGB; take npy")
        for seed, image in zip(seeds, pixels, strict=True):
            write_bytes(self.file(seed), png(image))

    def copy(self, seeds: Sequence[int], pixels: Pixels) -> None:
        """All of some images (n, h, w, c) that exist elsewhere; PNGs that are there already stay."""
        if self.format == "npy":
            write_npy(self.path / IMAGES, pixels)
            return
        missing = set(self.missing(seeds))
        for seed, image in zip(seeds, pixels, strict=True):
            if seed in missing:
                self.write([seed], image[None])

    def read(self, seeds: Sequence[int]) -> Pixels:
        """The images (n, h, w, c) of the first so many seeds, in the order in which they were made."""
        if self.format == "npy":
            return np.array(np.load(self.path / IMAGES, mmap_mode="r")[: len(seeds)])
        return np.stack(list(self._opened(seeds)))

    def _opened(self, seeds: Sequence[int]) -> Iterator[Pixels]:
        from PIL import Image

        for seed in seeds:
            with Image.open(self.file(seed)) as image:
                pixels = np.asarray(image)
            yield pixels[..., None] if pixels.ndim == 2 else pixels

    def _there(self) -> dict[str, Any] | None:
        """The protocol of the images that are there; None where there is none that can be read."""
        try:
            there = json.loads((self.path / PROTOCOL).read_text())
        except (OSError, ValueError):
            return None
        return there if isinstance(there, dict) else None


def _read_seeds(there: dict[str, Any] | None) -> list[int]:
    return parse_seeds(there["seeds"]) if there and there.get("seeds") else []


def _said(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
