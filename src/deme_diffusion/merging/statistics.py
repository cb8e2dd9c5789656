"""What a merge sees of its task vectors while it streams: norms, cosines and overlap, by layer group and in whole.

Nothing is read for it. Of a big model's big slices only runs of entries are looked at, one in each period, since a pass
over all of them would cost about as much as the merge; sums are scaled to the whole, and the share is told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isfinite
from typing import Any
from zlib import crc32

import torch

from deme_diffusion.weight_files import PROJECTION_KEY

WHOLE, BIG = 2**22, 2**16  # entries of a model that is looked at entirely; of a slice that is sampled otherwise
PIECE = 2**16  # entries at a time, so that the rows stay in the processor's cache
RUN, PERIOD = 1024, 16 * 1024  # whole runs, since entries taken one by one would read all of the memory anyway
GOLDEN = (5**0.5 - 1) / 2  # its multiples spread evenly over [0, 1): a run a period, never at the same columns
PROJECTION = PROJECTION_KEY.removesuffix(".")

_GROUP = re.compile(rf"{PROJECTION}\.|(?:[^.]+\.)*?(?:\w*(?:blocks|layers)\.\d+|mid_block)(?=\.)|[^.]+(?:\.\d+(?=\.))?")


def group_of(key: str) -> str:
    """The layer group of a parameter: down_blocks.0, mid_block, conv_in, transformer_blocks.3, ...; or projection."""
    found = _GROUP.match(key)
    return found[0].rstrip(".") if found else key


@dataclass
class Sums:
    """Sums over some entries of one layer group, all in float64 and scaled to all of its entries.

    `gram`: (N + 1, N + 1), products of theta, tau_1, ..., tau_N; `absolute`: (N,), sum |tau_i|; `apart`: (pairs,),
    sum of ||tau_i| - |tau_j||, in the order of `combinations`. `seen` of `entries` were looked at.
    """

    gram: torch.Tensor
    absolute: torch.Tensor
    apart: torch.Tensor
    entries: int = 0
    seen: int = 0

    @classmethod
    def zero(cls, num_experts: int) -> Sums:
        """Nothing seen yet."""
        pairs = num_experts * (num_experts - 1) // 2
        return cls(
            torch.zeros(num_experts + 1, num_experts + 1, dtype=torch.float64),
            torch.zeros(num_experts, dtype=torch.float64),
            torch.zeros(pairs, dtype=torch.float64),
        )

    def add(self, rows: torch.Tensor, scale: float) -> None:
        """Rows theta, tau_1, ..., tau_N of some entries, (N + 1, seen), float64, each of which stands for `scale`."""
        sizes = rows[1:].abs()
        self.gram += (rows @ rows.T) * scale
        self.absolute += sizes.sum(1) * scale
        self.apart += torch.pdist(sizes, p=1) * scale
        self.seen += rows.shape[1]

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram,
            self.absolute + other.absolute,
            self.apart + other.apart,
            self.entries + other.entries,
            self.seen + other.seen,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: null where a norm of 0 leaves a ratio without a value, or where an entry is NaN."""
        base, *norms = self.gram.diagonal().sqrt().tolist()
        return {
            "parameters": self.entries,
            "share_seen": self.seen / self.entries if self.entries else 1.0,
            "base_norm": _ratio(base, 1.0),
            "norms": [_ratio(norm, 1.0) for norm in norms],
            "relative_norms": [_ratio(norm, base) for norm in norms],
            "cosines": self._matrix([_ratio(g, a * b) for g, a, b in self._pairs(norms)], norms),
            "overlaps": self._matrix(self._overlaps(), norms),
        }

    def _pairs(self, norms: Sequence[float]) -> list[tuple[float, float, float]]:
        pairs = combinations(range(len(norms)), 2)
        return [(float(self.gram[i + 1, j + 1]), norms[i], norms[j]) for i, j in pairs]

    def _overlaps(self) -> list[float | None]:
        """sum min(a, b) / sum max(a, b), by min + max = a + b and max - min = |a - b|."""
        pairs = combinations(self.absolute.tolist(), 2)
        return [_ratio(a + b - d, a + b + d) for (a, b), d in zip(pairs, self.apart.tolist(), strict=True)]

    def _matrix(self, pairs: Sequence[float | None], norms: Sequence[float]) -> list[list[float | None]]:
        """Symmetric, with 1 for each task vector and itself."""
        matrix = [[1.0 if norm and i == j else None for j in range(len(norms))] for i, norm in enumerate(norms)]
        for (i, j), value in zip(combinations(range(len(norms)), 2), pairs, strict=True):
            matrix[i][j] = matrix[j][i] = value
        return matrix


class Statistics:
    """An Observer of a merge of N task vectors tau_i = theta_i - theta over `num_entries` entries.

    By layer group and in whole: ||theta||, ||tau_i||, ||tau_i|| / ||theta||, the cosines between task vectors, and
    their overlap sum_e min(|tau_i|, |tau_j|) / sum_e max(|tau_i|, |tau_j|): the weighted Jaccard index of magnitudes, 1
    where two experts change the same entries as much and 0 where they change others; both sums are additive over
    entries, so groups add up to the whole. Accumulated in float64.
    Projections are the group `projection`: their theta is 0, and the whole leaves them out.
    """

    def __init__(self, num_experts: int, num_entries: int) -> None:
        self.num_experts = num_experts
        self.sampled = num_entries > WHOLE
        self._groups: dict[str, Sums] = {}
        self._runs: dict[str, int] = {}

    def see(self, key: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        """A slice (or all) of one parameter: flat tensors in float32 or wider, the base's and the experts'."""
        if not base.numel():
            return
        runs = self._chosen(key, base.numel())
        theta, *others = (_at(tensor.reshape(-1), runs) for tensor in (base, *experts))
        self.see_sample(key, theta, others, base.numel())

    def see_sample(self, key: str, theta: torch.Tensor, others: Sequence[torch.Tensor], entries: int) -> None:
        """Some entries, flat, of one parameter of `entries`: the base's and the experts'."""
        sums = self._groups.setdefault(group_of(key), Sums.zero(self.num_experts))
        scale = entries / theta.numel()
        for first in range(0, theta.numel(), PIECE):
            piece = slice(first, first + PIECE)
            rows = torch.stack([theta[piece], *(other[piece] - theta[piece] for other in others)])
            sums.add(rows.double(), scale)
        sums.entries += entries

    def _chosen(self, key: str, size: int) -> list[int] | None:
        """Where the runs of a parameter's next slice begin, one in each period; None where all of it is looked at."""
        if not self.sampled or size < BIG:
            return None
        count, before = size // PERIOD, self._runs.get(key, 0)
        self._runs[key] = before + count
        phase, room = crc32(key.encode()) / 2**32, size // count - RUN
        return [i * size // count + int((phase + (before + i) * GOLDEN) % 1 * room) for i in range(count)]

    def groups(self) -> dict[str, Sums]:
        """Layer group -> its sums, by name, with numbers in their order."""
        return {name: self._groups[name] for name in sorted(self._groups, key=_natural)}

    def whole(self) -> Sums:
        """The sums over the model, projections left out."""
        parts = [sums for name, sums in self._groups.items() if name != PROJECTION]
        return sum(parts, Sums.zero(self.num_experts))

    def as_dict(self) -> dict[str, Any]:
        """For merge.json: `model`, and `groups` by name."""
        groups = {name: sums.as_dict() for name, sums in self.groups().items()}
        return {"model": self.whole().as_dict(), "groups": groups}


def _at(flat: torch.Tensor, runs: Sequence[int] | None) -> torch.Tensor:
    return flat if runs is None else torch.cat([flat[first : first + RUN] for first in runs])


def _ratio(value: float, by: float) -> float | None:
    return value / by if by and isfinite(value / by) else None


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
