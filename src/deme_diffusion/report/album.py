"""The images of a page and what they may weigh: each has ever smaller forms, and the heaviest shrink first."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image as Picture

MOST_BYTES = 5_000_000
"""Of a page, images and all."""
LARGE_SVG = 300_000  # from here on a PNG shows the same for less
SVG, PNG, JPEG = "image/svg+xml", "image/png", "image/jpeg"
WIDTHS = (1000, 500)  # pixels across, of PNGs that were too heavy


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as the address of an image, e.g. kind `image/png`."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


@dataclass
class Form:
    """One way to show an image: its bytes when they are asked for, and what is to be said of it."""

    kind: str
    make: Callable[[], bytes]
    note: str = ""

    @cached_property
    def src(self) -> str:
        """Its address; '' where it cannot be made."""
        try:
            return data_uri(self.make(), self.kind)
        except (OSError, ValueError, Picture.DecompressionBombError):
            return ""


@dataclass
class Image:
    """An image on the page: the first of its forms that fits, or none of them, with the note `lost`."""

    forms: list[Form]
    lost: str = "left out to save room"
    group: str = ""
    at: int = 0

    @property
    def form(self) -> Form | None:
        """What is shown of it."""
        return self.forms[self.at] if self.at < len(self.forms) else None

    @property
    def src(self) -> str:
        """Its address now; '' where nothing is left of it."""
        return self.form.src if self.form else ""

    @property
    def note(self) -> str:
        """What the reader must know of it."""
        return self.form.note if self.form else self.lost

    @property
    def opaque(self) -> bool:
        """Whether it has a ground of its own, and so stays light on a dark page."""
        return self.form is not None and self.form.kind == PNG

    def shrink(self) -> int:
        """Go on to the next form; how many bytes that saves."""
        before = len(self.src)
        self.at += 1
        return before - len(self.src)


@dataclass
class Album:
    """All images of a page."""

    images: list[Image] = field(default_factory=list)

    def add(self, forms: Sequence[Form], lost: str = Image.lost, group: str = "") -> Image:
        """An image with these forms, the best first; those of one group shrink together."""
        self.images.append(made := Image(list(forms), lost, group))
        return made

    def svg(self, data: bytes) -> Image:
        """A drawing made for the page."""
        return self.add([Form(SVG, lambda: data)])

    def drawn(self, svg: Path, png: Path) -> Image:
        """A figure on disk: its SVG where that is not large, else its PNG, else a smaller PNG.

        The files are checked by whoever names them (`page.pictures.figure_told`).
        """
        forms = [Form(SVG, svg.read_bytes)] if _size(svg) <= LARGE_SVG else []
        forms += [Form(PNG, png.read_bytes)] if png.is_file() else []
        said = f"shown smaller to save room: {png.name} lies beside"
        forms += [Form(PNG, _scaled(png, width), said) for width in WIDTHS if png.is_file()]
        return self.add(forms, f"left out to save room: {png.name} lies beside" if forms else f"{svg.name} is missing")

    def fit(self, render: Callable[[], str], most: int = MOST_BYTES) -> str:
        """The page, its heaviest images shrunk until it weighs at most so many bytes, as far as images can help."""
        text = render()
        while (over := len(text.encode()) - most) > 0 and any(image.form for image in self.images):
            while over > 0 and (left := [image for image in self.images if image.form]):
                heaviest = max(left, key=lambda image: len(image.src))
                over -= sum(
                    image.shrink() for image in left if image is heaviest or (image.group == heaviest.group != "")
                )
            text = render()
        return text

    @property
    def shortened(self) -> list[str]:
        """What the page says above about images that are not shown in full."""
        count = sum(image.at > 0 for image in self.images)
        if not count:
            return []
        words = "1 image is" if count == 1 else f"{count} images are"
        return [f"To keep this page small, {words} shown smaller or left out; the files beside it are whole."]


def _size(path: Path) -> float:
    return path.stat().st_size if path.is_file() else float("inf")


def _scaled(png: Path, width: int) -> Callable[[], bytes]:
    def make() -> bytes:
        with Picture.open(png) as picture:
            picture.thumbnail((width, 4 * width))
            out = io.BytesIO()
            picture.save(out, format="PNG", optimize=True)
        return out.getvalue()

    return make
