"""Where images come from. A source yields 8-bit images by index; everything after it is the same for all sources."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from deme_diffusion.data.classes import Classes
from deme_diffusion.errors import MachineError
from deme_diffusion.files import file_digest

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = (
    "a handwritten {}",
    "the digit {}",
    "a picture of the number {}",
    "{}",
    "a small grey {} drawn by hand",
    "the numeral {} in pencil",
    "a photo of the number {}",
    "a scan of the number {} written by hand in grey ink",
)
SplitName = Literal["train", "search", "report"]
Pixels = npt.NDArray[np.uint8]


class Source(Protocol):
    """Images by index: `pixels(i)` is uint8 (height, width, channels); labels and captions are optional."""

    def __len__(self) -> int: ...

    def pixels(self, index: int) -> Pixels: ...

    def label(self, index: int) -> int | None: ...

    @property
    def classes(self) -> Classes:
        """Which classes the labels are in the data set, where it is known."""

    def captions(self, index: int) -> Sequence[str]:
        """One or several captions of an image; none where the source has no text."""

    def has_captions(self, index: int) -> bool:
        """Whether an image has some, at no cost."""

    def called(self, index: int) -> str:
        """How a reader finds an image."""


class Digits:
    """The 1,797 real 8x8 grey digits that scikit-learn embeds (Alpaydin and Kaynak 1998), 0..16 scaled to 0..255."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        self._pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)[..., None]
        self._labels = bunch.target

    def __len__(self) -> int:
        return len(self._pixels)

    def pixels(self, index: int) -> Pixels:
        """uint8 (8, 8, 1)."""
        return np.asarray(self._pixels[index])

    def label(self, index: int) -> int:
        """The digit, 0..9."""
        return int(self._labels[index])

    @property
    def classes(self) -> Classes:
        """The digits."""
        return Classes(range(10))

    def captions(self, index: int) -> Sequence[str]:
        """The digit in several wordings."""
        word = WORDS[self.label(index)]
        return [wording.format(word) for wording in WORDINGS]

    def has_captions(self, index: int) -> bool:
        """All have."""
        return True

    def called(self, index: int) -> str:
        """By number."""
        return f"number {index}"

    @staticmethod
    def content_digest() -> str:
        """Digest of the embedded file, without importing scikit-learn."""
        spec = importlib.util.find_spec("sklearn")
        if spec is None or spec.origin is None:
            raise MachineError("data.source digits: scikit-learn is not installed; install deme-diffusion again")
        return file_digest(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz")
