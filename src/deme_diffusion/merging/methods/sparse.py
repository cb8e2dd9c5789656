"""Methods that drop entries of the task vectors first: by size, at random, or by rank.

Each but DELLA works on entries one by one, once it knows its thresholds: slice by slice, so that all stays in the
processor's cache. A NaN stays a NaN in all of them: whoever merges checks that the result is finite, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from deme_diffusion import rng
from deme_diffusion.config import MethodOptions
from deme_diffusion.merging.methods import Look, Parameter, Thresholds
from deme_diffusion.merging.thresholds import kept, magnitudes
from deme_diffusion.merging.vectors import Weight, slices

STEP = 1 << 15
"""Entries at a time: some ten float32 arrays of them stay in a processor's own cache."""
Left = Callable[[int, slice], torch.Tensor]
"""What is left of tau_i at some flat entries, made anew."""


def ties(p: Parameter) -> Weight:
    """theta + disjoint mean of trimmed tau_i (Yadav et al. 2023, Algorithm 1).

    The trim keeps the share `density` of largest |tau_i|, equal ones together: of this tensor or, where p.thresholds
    are so, of the whole task vector, as the original does.
    """
    return _disjoint_mean(p, _between(p, ties_thresholds))


def ties_thresholds(magnitude: torch.Tensor, options: MethodOptions) -> Thresholds:
    """The least |tau_i| that stays."""
    size = magnitude.numel()
    return _at(magnitude, [size - kept(_given(options.density), size)])


def dare_linear(p: Parameter) -> Weight:
    """theta + sum_i w_i m_i tau_i / density, m_i ~ Bernoulli(density) (Yu et al. 2024)."""
    return _sum(p, _dropped(p))


def dare_ties(p: Parameter) -> Weight:
    """theta + disjoint mean of m_i tau_i / density, m_i ~ Bernoulli(density) (Yu et al. 2024)."""
    return _disjoint_mean(p, _dropped(p))


def breadcrumbs(p: Parameter) -> Weight:
    """theta + sum_i w_i m_i tau_i: m_i removes both ends of |tau_i| (Davari and Belilovsky 2024)."""
    return _sum(p, _between(p, breadcrumbs_thresholds))


def breadcrumbs_thresholds(magnitude: torch.Tensor, options: MethodOptions) -> Thresholds:
    """The least and the largest |tau_i| that stay.

    Removed are the share `outliers` of the largest and, of the smallest, what `density` then leaves out. Counts are
    rounded down and equal entries stay together, so that something stays of the smallest tensor.
    """
    size, outliers = magnitude.numel(), _given(options.outliers)
    bottom = max(0, int((1 - _given(options.density) - outliers) * size * (1 + 1e-12)))
    return _at(magnitude, [bottom, size - 1 - int(outliers * size)])


def della(p: Parameter) -> Weight:
    """theta + disjoint mean of what MAGPRUNE leaves of tau_i (Deep et al. 2024)."""
    left = [_magpruned(p, i).view(-1) for i in range(len(p.experts))]
    return _disjoint_mean(p, lambda i, at: left[i][at])


# -- what becomes of the task vectors --------------------------------------------------------------


def _sum(p: Parameter, left: Left) -> Weight:
    """theta + sum_i w_i v_i."""
    merged = p.start()
    result = merged.view(-1)
    for at in slices(result.numel(), STEP):
        for i, w in enumerate(p.weights):
            if w:
                result[at].add_(left(i, at).mul_(w))
    return Weight(merged)


def _disjoint_mean(p: Parameter, left: Left) -> Weight:
    """theta + sum of w_i v_i over the v_i that have the elected sign / their number.

    The sign of sum_i v_i is elected, + where that is 0; weights neither vote nor enter the number, so their signs may
    be mixed. Votes are summed in float64, so that the order of the experts decides none.
    """
    merged = p.start()
    result = merged.view(-1)
    room = [torch.empty_like(result[:STEP]) for _ in range(3)]
    for at in slices(result.numel(), STEP):
        vectors = [left(i, at) for i in range(len(p.experts))]
        votes = vectors[0].to(torch.float64, copy=True)
        for vector in vectors[1:]:
            votes += vector
        sign = torch.ge(votes, 0).view(torch.uint8).to(merged.dtype).mul_(2).sub_(1)
        top, count, agrees = (own[: sign.numel()].zero_() for own in room)
        for vector, w in zip(vectors, p.weights, strict=True):
            along = vector.mul_(sign).clamp_(min=0)  # of NaN it stays NaN
            count += torch.gt(along, 0, out=agrees)
            top += along.mul_(w)
        result[at] += top.mul_(sign).div_(count.clamp_(min=1))
    return Weight(merged)


# -- what is left of one task vector ---------------------------------------------------------------


def _between(p: Parameter, look: Look) -> Left:
    """tau_i where its size lies between thresholds, both included."""
    thresholds = p.thresholds
    if thresholds is None:
        wholes = (magnitudes(p.base.value, expert.value) for expert in p.experts)
        thresholds = [look(whole, p.options) for whole in wholes]

    def left(i: int, at: slice) -> torch.Tensor:
        tau = p.entries(i, at)
        size = tau.abs().float()  # thresholds are told in float32
        stays = torch.empty_like(size)
        for compare, threshold in zip((torch.ge, torch.le), thresholds[i], strict=False):
            tau *= compare(size, threshold, out=stays)
        return tau

    return left


def _dropped(p: Parameter) -> Left:
    """m tau_i / density, m ~ Bernoulli(density), keyed by the seed, the parameter, the expert and the entry's place."""
    seed, density = int(_given(p.options.seed)), _given(p.options.density)
    limit = min(math.ceil(density * 2**32), 2**32 - 1) - 2**31

    def left(i: int, at: slice) -> torch.Tensor:
        tau = p.entries(i, at)
        if density < 1:
            words = rng.words(seed, "dare", p.name, i, first=p.first + at.start, count=tau.numel())
            mask = torch.from_numpy(words).to(tau.device)
            tau *= torch.lt(mask, limit, out=torch.empty(mask.shape, device=tau.device))
        return tau.div_(density)

    return left


def _magpruned(p: Parameter, i: int) -> torch.Tensor:
    """tau_i, each entry dropped with probability q, else divided by 1 - q.

    q = 1 - density + epsilon ((r + 1/2) / n - 1/2) by the rank r = 0 (largest), ..., n - 1 within a row of n: the
    paper's epsilon r / n, centred, so that the mean of q is 1 - density in rows of any length. Where q would leave
    [0, 1 - density / 2], epsilon is lessened: entries are enlarged 2 / density times at the most.
    """
    tau, density, random = (
        p.vector(i),
        _given(p.options.density),
        rng.generator(int(_given(p.options.seed)), "della", p.name, i),
    )
    if not tau.numel():
        return tau
    spread = min(_given(p.options.epsilon), density, 2 * (1 - density))
    rows = tau.view(tau.shape[0], -1) if tau.ndim > 1 else tau.view(1, -1)
    length = rows.shape[1]
    keep = density - spread * ((torch.arange(length, device=tau.device) + 0.5) / length - 0.5)
    for part in slices(len(rows), max(1, (1 << 18) // length)):
        order = _ranked(rows[part])
        own = torch.empty_like(rows[part]).scatter_(1, order, keep.to(tau.dtype).expand(order.shape))
        rows[part] *= (_uniform(random, own) < own) / own
    return tau


def _ranked(rows: torch.Tensor) -> torch.Tensor:
    """The places of each row by falling |tau| in float32, NaN first and equal ones in their order.

    Bit patterns of floats >= 0 are ordered as the floats are: a key of pattern and place is unlike all others, so that
    numpy's vectorised sort, which keeps no order of equal ones, gives one answer.
    """
    patterns = rows.abs().float().view(torch.int32).to(torch.int64)
    keys = ((2**31 - 1 - patterns) << 32 | torch.arange(rows.shape[1], device=rows.device)).cpu().numpy()
    keys.sort(axis=1)
    return torch.from_numpy(keys).to(rows.device) & 0xFFFFFFFF


def _at(magnitude: torch.Tensor, places: Sequence[int]) -> Thresholds:
    """Values at rising places of the ascending order, NaN last; numpy's selection keeps no index for each value."""
    if not magnitude.numel():
        return (math.inf,) * len(places)
    values, found, first = magnitude.cpu().numpy(), [], 0
    for place in places:  # one at a time: only such a selection is vectorised
        values[first:].partition(place - first)
        found.append(float(values[first := place]))
    return tuple(found)


def _uniform(random: np.random.Generator, like: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), shaped as `like`."""
    return torch.from_numpy(random.random(like.shape, dtype=np.float32)).to(like.device)


def _given(option: float | None) -> float:
    assert option is not None, "options come resolved"
    return option
