"""Methods that drop entries of the task vectors first: by size, at random, or by rank.

A NaN stays a NaN in all of them: whoever merges checks that the result is finite, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from deme_diffusion import rng
from deme_diffusion.merging.methods import Parameter
from deme_diffusion.merging.thresholds import kept
from deme_diffusion.merging.vectors import Weight, slices


def ties(p: Parameter) -> Weight:
    """theta + disjoint mean of trimmed tau_i (Yadav et al. 2023, Algorithm 1).

    The trim keeps the share `density` of largest |tau_i|, equal ones together: of this tensor or, with p.thresholds, of
    the whole task vector, as the original does.
    """
    return _disjoint_mean(p, [_trimmed(p, i) for i in range(len(p.experts))])


def dare_linear(p: Parameter) -> Weight:
    """theta + sum_i w_i m_i tau_i / density, m_i ~ Bernoulli(density) (Yu et al. 2024)."""
    return _sum(p, _dropped)


def dare_ties(p: Parameter) -> Weight:
    """theta + disjoint mean of m_i tau_i / density, m_i ~ Bernoulli(density) (Yu et al. 2024)."""
    return _disjoint_mean(p, [_dropped(p, i) for i in range(len(p.experts))])


def breadcrumbs(p: Parameter) -> Weight:
    """theta + sum_i w_i m_i tau_i: m_i removes both ends of |tau_i| (Davari and Belilovsky 2024)."""
    return _sum(p, _crumbs)


def della(p: Parameter) -> Weight:
    """theta + disjoint mean of what MAGPRUNE leaves of tau_i (Deep et al. 2024)."""
    return _disjoint_mean(p, [_magpruned(p, i) for i in range(len(p.experts))])


def _sum(p: Parameter, sparse: Callable[[Parameter, int], torch.Tensor]) -> Weight:
    """theta + sum_i w_i sparse(tau_i), an expert at a time."""
    merged = p.start()
    for i, w in enumerate(p.weights):
        if w:
            merged.add_(sparse(p, i), alpha=w)
    return Weight(merged)


def _disjoint_mean(p: Parameter, vectors: Sequence[torch.Tensor]) -> Weight:
    """theta + sum of w_i v_i over the v_i that have the elected sign / their number.

    The sign of sum_i v_i is elected, + where that is 0; weights neither vote nor enter the number, so their signs may
    be mixed. In float64, so that the order of the experts decides no vote.
    """
    merged = p.start()
    result, flat = merged.view(-1), [v.view(-1) for v in vectors]
    weights = torch.tensor(p.weights, dtype=torch.float64, device=merged.device)
    for part in slices(result.numel()):
        stack = torch.stack([v[part].double() for v in flat])
        elected = torch.where(stack.sum(0) < 0, -1.0, 1.0)
        agree = ~(stack * elected <= 0)  # NaN agrees: it must not vanish
        result[part] += (weights @ (stack * agree)) / agree.sum(0).clamp(min=1)
    return Weight(merged)


def _trimmed(p: Parameter, i: int) -> torch.Tensor:
    """tau_i with its entries under the threshold at 0."""
    tau = p.vector(i)
    if not tau.numel():
        return tau
    if p.thresholds is not None:
        return tau.mul_(~(tau.abs().float() < p.thresholds[i]))  # thresholds are told in float32
    least = _at(tau, [tau.numel() - kept(_given(p.options.density), tau.numel())])[0]
    return tau.mul_(~(tau.abs() < least))


def _crumbs(p: Parameter, i: int) -> torch.Tensor:
    """tau_i without the share `outliers` of its largest entries, and of the smallest what `density` then leaves out.

    Counts are rounded down and equal entries stay together, so that something stays of the smallest tensor.
    """
    tau, outliers = p.vector(i), _given(p.options.outliers)
    size = tau.numel()
    if not size:
        return tau
    bottom = max(0, int((1 - _given(p.options.density) - outliers) * size * (1 + 1e-12)))
    low, high = _at(tau, [bottom, size - 1 - int(outliers * size)])
    magnitude = tau.abs()
    return tau.mul_(~((magnitude < low) | (magnitude > high)))


def _dropped(p: Parameter, i: int) -> torch.Tensor:
    """m tau_i / density, m ~ Bernoulli(density), keyed by the seed, the parameter and the expert."""
    tau, density, random = p.vector(i), _given(p.options.density), _random(p, "dare", i)
    flat = tau.view(-1)
    for part in slices(flat.numel()):
        flat[part] *= (_uniform(random, flat[part]) < density) / density
    return tau


def _magpruned(p: Parameter, i: int) -> torch.Tensor:
    """tau_i, each entry dropped with probability q, else divided by 1 - q.

    q = 1 - density + epsilon ((r + 1/2) / n - 1/2) by the rank r = 0 (largest), ..., n - 1 within a row of n: the
    paper's epsilon r / n, centred, so that the mean of q is 1 - density in rows of any length. Where q would leave
    [0, 1 - density / 2], epsilon is lessened: entries are enlarged 2 / density times at the most.
    """
    tau, density, random = p.vector(i), _given(p.options.density), _random(p, "della", i)
    if not tau.numel():
        return tau
    spread = min(_given(p.options.epsilon), density, 2 * (1 - density))
    rows = tau.view(tau.shape[0], -1) if tau.ndim > 1 else tau.view(1, -1)
    length = rows.shape[1]
    keep = density - spread * ((torch.arange(length, device=tau.device) + 0.5) / length - 0.5)
    for part in slices(len(rows), max(1, (1 << 18) // length)):
        order = rows[part].abs().argsort(dim=1, descending=True, stable=True)
        own = torch.empty_like(rows[part]).scatter_(1, order, keep.to(tau.dtype).expand(order.shape))
        rows[part] *= (_uniform(random, own) < own) / own
    return tau


def _at(tau: torch.Tensor, places: Sequence[int]) -> list[float]:
    """|tau| at places of its ascending order; NaN last. numpy's selection works in place, without an index a value."""
    magnitude = tau.abs().view(-1).cpu().numpy()
    magnitude.partition(sorted(set(places)))
    return [float(magnitude[place]) for place in places]


def _random(p: Parameter, purpose: str, i: int) -> np.random.Generator:
    return rng.generator(int(_given(p.options.seed)), purpose, p.name, i)


def _uniform(random: np.random.Generator, like: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), shaped as `like`."""
    return torch.from_numpy(random.random(like.shape, dtype=np.float32)).to(like.device)


def _given(option: float | None) -> float:
    assert option is not None, "options come resolved"
    return option
