"""How [0, T) is cut into N subsets: two tables, and nothing else reads anything but these (Eq. 3, Eq. 7). No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deme_diffusion.errors import UserError

Runs = list[list[int]]
"""Half-open runs [[lo, hi), ...] of consecutive timesteps: a subset as it stands in digests and files."""


@dataclass(frozen=True, eq=False)
class Division:
    """`member` (N x T, bool): which timesteps expert i trains on; `route` (T, int): which expert serves timestep t.

    Overlaps and holes in `member` are allowed; `route` names an expert for every t.
    """

    member: npt.NDArray[np.bool_]
    route: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        experts, timesteps = self.member.shape
        if self.route.shape != (timesteps,):
            raise ValueError(f"route has shape {self.route.shape}, member {self.member.shape}")
        if self.route.min() < 0 or self.route.max() >= experts:
            raise ValueError(f"route names an expert outside 0..{experts - 1}")
        if not self.member.any(axis=1).all():
            raise ValueError(f"expert {int(np.argmin(self.member.any(axis=1)))} has no timestep")

    @property
    def num_experts(self) -> int:
        """N."""
        return int(self.member.shape[0])

    @property
    def num_timesteps(self) -> int:
        """T."""
        return int(self.member.shape[1])

    def subset(self, index: int) -> Runs:
        """The timesteps of one expert as runs."""
        return to_runs(np.flatnonzero(self.member[index]))

    def served(self, index: int) -> Runs:
        """The timesteps that one expert serves, as runs; over all experts they are [0, T), once."""
        return to_runs(np.flatnonzero(self.route == index))

    def as_dict(self) -> dict[str, object]:
        """Plain values for files: subsets as runs, the route as [lo, hi, expert]."""
        route = [[lo, hi, int(self.route[lo])] for lo, hi in _constant_runs(self.route)]
        subsets = [self.subset(i) for i in range(self.num_experts)]
        return {"num_train_timesteps": self.num_timesteps, "subsets": subsets, "route": route}


def uniform(num_ranges: int, num_timesteps: int, *, key: str = "decouple.num_ranges") -> Division:
    """N contiguous ranges R_i = [iT/N, (i+1)T/N) that do not overlap, each served by its expert (Eq. 3, Eq. 7).

    Raises UserError, naming the setting `key`, where N is above T.
    """
    if num_ranges > num_timesteps:
        raise UserError(
            f"{key}: {num_ranges} ranges do not fit into {num_timesteps} timesteps; the most is {num_timesteps}"
        )
    # Integer arithmetic: t belongs to expert floor(t N / T), the paper's own routing rule.
    route = np.arange(num_timesteps, dtype=np.int64) * num_ranges // num_timesteps
    return Division(member=route[None, :] == np.arange(num_ranges)[:, None], route=route)


def whole(num_timesteps: int) -> Runs:
    """The subset of a model that trains on every timestep."""
    return [[0, num_timesteps]]


def reported(subset: Runs, num_timesteps: int) -> list[Runs]:
    """The ranges by which a training on `subset` is reported: quarters for all of [0, T), else its own and the rest.

    A function of the subset alone, so that an expert does not depend on the division it came from.
    """
    if subset == whole(num_timesteps):
        quarters = uniform(min(4, num_timesteps), num_timesteps)
        return [quarters.subset(i) for i in range(quarters.num_experts)]
    return [subset, to_runs(np.setdiff1d(np.arange(num_timesteps), from_runs(subset)))]


def owners(ranges: list[Runs], num_timesteps: int) -> npt.NDArray[np.int64]:
    """(T,) which of some ranges each timestep is in; -1 for none."""
    table = np.full(num_timesteps, -1, dtype=np.int64)
    for index, runs in enumerate(ranges):
        table[from_runs(runs)] = index
    return table


def to_runs(timesteps: npt.NDArray[np.int64]) -> Runs:
    """Sorted timesteps (k,) as half-open runs."""
    if not len(timesteps):
        return []
    breaks = np.flatnonzero(np.diff(timesteps) != 1) + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in np.split(timesteps, breaks)]


def from_runs(runs: Runs) -> npt.NDArray[np.int64]:
    """The sorted timesteps (k,) of half-open runs; the inverse of `to_runs`."""
    parts = [np.arange(lo, hi, dtype=np.int64) for lo, hi in runs]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def name_of(runs: Runs) -> str:
    """How a subset is written in tables and logs: `[0,250)`, several runs joined by `+`, more than three counted."""
    if len(runs) > 3:
        return f"{len(from_runs(runs))} timesteps in {len(runs)} runs"
    return "+".join(f"[{lo},{hi})" for lo, hi in runs)


def names_of(subsets: Sequence[Runs]) -> list[str]:
    """`name_of` of several subsets, none alike: those that are only counted begin with their number, `#0`."""
    return [f"#{i} {name_of(runs)}" if len(runs) > 3 else name_of(runs) for i, runs in enumerate(subsets)]


def _constant_runs(values: npt.NDArray[np.int64]) -> Runs:
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [[lo, hi] for lo, hi in itertools.pairwise(edges)]
