"""What a picture is: how it is drawn, and what it says to those who cannot see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Picture:
    """One picture. `name` is the stem of its files; `title` and `caption` are plain text for the page, the caption with
    the numbers that the picture shows; `alt` says what is seen. `draw` draws on a matplotlib figure of `width` x
    `height` inches."""

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[Any], None]
    width: float = 7.0
    height: float = 3.2
