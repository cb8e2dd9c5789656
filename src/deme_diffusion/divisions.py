"""The divisions that `decouple.division` names, each a pure function that gives the two tables. No torch.

A division of [0, T) into N ranges by its inner edges e_1 < ... < e_{N-1} is [0, e_1), [e_1, e_2), ..., [e_{N-1}, T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deme_diffusion.config import DecoupleSettings
from deme_diffusion.division import Division, uniform
from deme_diffusion.errors import UserError
from deme_diffusion.rng import generator

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Similarity:
    """Cosine similarities (K, K) of the gradients of K bins of timesteps, cut at `edges` (K + 1,) from 0 to T."""

    cosine: Array
    edges: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Facts:
    """What a division may depend on beside its settings: T, the (T,) SNR of the base's schedule, and similarities."""

    num_timesteps: int
    snr: Callable[[], Array]
    similarity: Similarity | None = None


def explicit(edges: Sequence[int], num_timesteps: int) -> Division:
    """Contiguous ranges by their inner edges, each served by its expert. Raises UserError for an edge that is none."""
    inner = np.asarray(edges, dtype=np.int64)
    if len(inner) and (inner[0] < 1 or inner[-1] >= num_timesteps or (np.diff(inner) < 1).any()):
        said = ", ".join(map(str, edges))
        raise UserError(f"decouple.edges: {said}; ascending ones from 1 to {num_timesteps - 1} are needed")
    route = np.searchsorted(inner, np.arange(num_timesteps), side="right")
    return Division(member=route[None, :] == np.arange(len(inner) + 1)[:, None], route=route)


def overlapping(num_ranges: int, num_timesteps: int, overlap: float) -> Division:
    """Uniform ranges, each extended by `overlap` x its width into each neighbour and clipped to [0, T).

    The nearest centre of the (not extended) ranges serves, which is the uniform route; no overlap is `uniform`.
    """
    ranges = uniform(num_ranges, num_timesteps)
    member = np.zeros_like(ranges.member)
    for row, part in zip(member, ranges.member, strict=True):
        inside = np.flatnonzero(part)
        reach = round(overlap * len(inside))
        row[max(0, inside[0] - reach) : inside[-1] + 1 + reach] = True
    return Division(member, ranges.route)


def random_boundaries(num_ranges: int, num_timesteps: int, seed: int) -> Division:
    """Contiguous ranges of at least one timestep between N - 1 distinct inner edges drawn at random."""
    uniform(num_ranges, num_timesteps)  # refuses an N that does not fit
    order = generator(seed, "random boundaries").permutation(num_timesteps - 1) + 1
    return explicit(sorted(order[: num_ranges - 1].tolist()), num_timesteps)


def random_assignment(num_ranges: int, num_timesteps: int, seed: int) -> Division:
    """Every timestep to an expert at random, as many to each as there is place for; not contiguous."""
    order = generator(seed, "random assignment").permutation(num_timesteps)
    route = uniform(num_ranges, num_timesteps).route[order]
    return Division(member=route[None, :] == np.arange(num_ranges)[:, None], route=route)


def log_snr(num_ranges: int, snr: Array) -> Division:
    """Ranges of equal length in l = log SNR between its ends l_0 and l_e: t is in floor(N (l_0 - l_t) / (l_0 - l_e)).

    `snr` (T,) falls with t; timesteps without any signal are in the last range. Raises UserError where a range would
    hold no timestep.
    """
    if num_ranges == 1 or num_ranges > len(snr):
        return uniform(num_ranges, len(snr))
    log = np.log(snr[snr > 0])
    place = (log[0] - log) / max(log[0] - log[-1], np.finfo(np.float64).tiny)
    route = np.full(len(snr), num_ranges - 1, dtype=np.int64)
    route[: len(log)] = np.minimum((place * num_ranges).astype(np.int64), num_ranges - 1)
    if empty := sorted(set(range(num_ranges)) - set(route.tolist())):
        raise UserError(
            f"decouple.num_ranges: with division=log_snr, range {empty[0]} of {num_ranges} holds none of the "
            f"{len(snr)} timesteps; take fewer ranges"
        )
    return explicit(np.searchsorted(route, np.arange(1, num_ranges)).tolist(), len(snr))


def gradient_similarity(num_ranges: int, similarity: Similarity) -> Division:
    """Contiguous ranges, cut at bins' edges, within which gradients conflict least.

    Minimises sum_R m_R c_R exactly, with m_R the timesteps of a range and c_R the mean of 1 - cosine over all ordered
    pairs of them: the conflict that a timestep meets within its range (of unit gradients, the variance within ranges).
    Raises UserError where there are fewer bins than ranges. O(N K^2).
    """
    bins = len(similarity.cosine)
    if num_ranges > bins:
        raise UserError(f"decouple.num_ranges: {num_ranges} ranges do not fit into {bins} bins of the similarity")
    chosen = best_cuts(conflicts(similarity), num_ranges)
    return explicit(similarity.edges[chosen].tolist(), int(similarity.edges[-1]))


def conflicts(similarity: Similarity) -> Array:
    """(K + 1, K + 1): m c of the bins [a, b) at a < b, infinite elsewhere, by prefix sums."""
    edges = similarity.edges
    width = np.diff(edges).astype(np.float64)
    # A bin's gradient stands for all of its timesteps, so that the diagonal counts as no conflict.
    conflict = (1 - similarity.cosine) * np.outer(width, width)
    np.fill_diagonal(conflict, 0.0)
    prefix = np.zeros((len(edges), len(edges)))
    prefix[1:, 1:] = conflict.cumsum(0).cumsum(1)
    corner = np.diagonal(prefix)
    pairs = corner[None, :] - prefix - prefix.T + corner[:, None]  # the sum over the square [a, b) x [a, b)
    size = (edges[None, :] - edges[:, None]).astype(np.float64)
    cost = np.full_like(pairs, np.inf)
    return np.divide(pairs, size, out=cost, where=size > 0)


def best_cuts(cost: Array, parts: int) -> list[int]:
    """The inner cuts of 0..K into `parts` intervals with the least sum of cost[a, b]; the lowest cuts of equal ones."""
    total, came = cost[0].copy(), list[npt.NDArray[np.int64]]()
    for _ in range(parts - 1):
        through = total[:, None] + cost
        came.append(through.argmin(axis=0))
        total = through.min(axis=0)
    cuts, end = list[int](), len(cost) - 1
    for before in reversed(came):
        cuts.insert(0, end := int(before[end]))
    return cuts


def _by_similarity(settings: DecoupleSettings, facts: Facts) -> Division:
    assert facts.similarity is not None, "the graph waits for the similarity"
    return gradient_similarity(settings.num_ranges, facts.similarity)


DIVISIONS: Mapping[str, Callable[[DecoupleSettings, Facts], Division]] = {
    "uniform": lambda settings, facts: uniform(settings.num_ranges, facts.num_timesteps),
    "overlapping": lambda settings, facts: overlapping(settings.num_ranges, facts.num_timesteps, settings.overlap),
    "random_boundaries": lambda settings, facts: random_boundaries(
        settings.num_ranges, facts.num_timesteps, settings.division_seed
    ),
    "random_assignment": lambda settings, facts: random_assignment(
        settings.num_ranges, facts.num_timesteps, settings.division_seed
    ),
    "log_snr": lambda settings, facts: log_snr(settings.num_ranges, facts.snr()),
    "gradient_similarity": _by_similarity,
    "explicit": lambda settings, facts: explicit(settings.edges or (), facts.num_timesteps),
}
"""Every division by its name in `decouple.division`."""
