"""The only place where randomness is derived. Every draw is a pure function of a seed and of what it is for.

Training draws are keyed by (seed, step, global sample index) and sampled images by (seed, image index), so results
depend neither on batch boundaries, nor on the number of processes, nor on interruptions. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Draw = str | int


def seed_of(seed: int, *purpose: Draw) -> int:
    """A 63-bit seed for a generator that is not ours (torch's), derived from a seed and a purpose."""
    return int.from_bytes(_digest(seed, purpose)[:8], "little") >> 1


def generator(seed: int, *purpose: Draw) -> np.random.Generator:
    """A counter-based generator (Philox) of its own for one purpose: equal keys, equal draws, on every machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, purpose), "little")))


def per_sample(seed: int, purpose: str, step: int, first: int, count: int) -> Iterator[np.random.Generator]:
    """For each global sample index first, first + 1, ... a generator at that sample's own counter.

    It is one generator that moves on (making one costs ten times a seek): use it before taking the next.
    """
    key = np.frombuffer(_digest(seed, (purpose, step)), dtype=np.uint64)
    philox = np.random.Philox(0)
    moving, nothing = np.random.Generator(philox), np.zeros(4, dtype=np.uint64)
    rest: Any = {"bit_generator": "Philox", "buffer": nothing, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
    for index in range(first, first + count):
        # The index stands in the second counter word, which leaves each sample 2^64 blocks of its own.
        rest["state"] = {"counter": (0, index, 0, 0), "key": key}
        philox.state = rest
        yield moving


def words(seed: int, *purpose: Draw, first: int, count: int) -> npt.NDArray[np.int32]:
    """Random 32-bit words first, ..., first + count - 1 of one purpose: each a function of its own place, for masks."""
    block, skip = divmod(first, 8)  # Philox gives blocks of four 64-bit words
    philox = np.random.Philox(key=int.from_bytes(_digest(seed, purpose), "little"), counter=block)
    raw = philox.random_raw((skip + count + 1) // 2).astype("<u8", copy=False)
    return raw.view("<i4").astype(np.int32, copy=False)[skip : skip + count]


def uniforms(seed: int, purpose: str, step: int, first: int, count: int, each: int = 1) -> npt.NDArray[np.float64]:
    """(count, each) numbers in [0, 1), a row for each global sample index from `first` on."""
    return np.stack([own.random(each) for own in per_sample(seed, purpose, step, first, count)])


def normals(
    seed: int, purpose: str, step: int, first: int, count: int, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """(count, *shape) standard normal noise, a row for each global sample index from `first` on."""
    noise = np.empty((count, *shape), dtype=np.float32)
    for row, own in zip(noise, per_sample(seed, purpose, step, first, count), strict=True):
        own.standard_normal(out=row, dtype=np.float32)
    return noise


@lru_cache(maxsize=4)
def image_order(seed: int, epoch: int, num_images: int) -> npt.NDArray[np.int64]:
    """The order (num_images,) in which an epoch visits the images: a pure function of (seed, epoch)."""
    order = generator(seed, "order", epoch).permutation(num_images)
    order.setflags(write=False)  # the cache hands it out again
    return order


def image_at(seed: int, slot: int, num_images: int) -> int:
    """The image that global sample `slot` of a training run sees: epochs follow each other without a gap."""
    epoch, position = divmod(slot, num_images)
    return int(image_order(seed, epoch, num_images)[position])


def _digest(seed: int, purpose: tuple[Draw, ...]) -> bytes:
    return hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=16).digest()
