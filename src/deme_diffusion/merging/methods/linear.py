"""Methods that weigh whole task vectors, or entry by entry: Eq. 8 and its kin. theta is the base."""

from __future__ import annotations

import math
from functools import reduce

import torch

from deme_diffusion.merging.methods import Parameter
from deme_diffusion.merging.vectors import Weight, interpolate, slices, wide

COLINEAR = 1e-3  # sine of the angle under which the arc is taken for its chord


def task_arithmetic(p: Parameter) -> Weight:
    """theta + sum_i w_i tau_i (Eq. 8)."""
    return interpolate(p.base, list(p.experts), list(p.weights))


def average(p: Parameter) -> Weight:
    """(1/N) sum_i theta_i, whatever the weights (Wortsman et al. 2022)."""
    total = wide(p.experts[0].value)
    for expert in p.experts[1:]:
        total = total + wide(expert.value)
    return Weight(total / len(p.experts))


def slerp(p: Parameter) -> Weight:
    """theta + s [sin((1 - t) W) sgn(w_1) tau_1 + sin(t W) sgn(w_2) tau_2] / sin W  (Shoemake 1985).

    s = |w_1| + |w_2|, t = |w_2| / s, W: the angle between sgn(w_1) tau_1 and sgn(w_2) tau_2 over the whole tensor.
    Where they are (nearly) colinear, or one is 0, it is their linear combination, which is Eq. 8.
    """
    first, second = p.weights
    share, (one, both, other) = abs(first) + abs(second), _products(p.vector(0), p.vector(1))
    if not (share and one and other):
        return task_arithmetic(p)
    cosine = both / math.sqrt(one * other) * math.copysign(1, first) * math.copysign(1, second)
    angle = math.acos(min(1.0, max(-1.0, cosine))) if math.isfinite(cosine) else 0.0
    if math.sin(angle) < COLINEAR:
        return task_arithmetic(p)
    arcs = [math.sin(abs(w) / share * angle) / math.sin(angle) for w in p.weights]
    factors = [math.copysign(share * arc, w) for arc, w in zip(arcs, p.weights, strict=True)]
    return interpolate(p.base, list(p.experts), factors)


def fisher(p: Parameter) -> Weight:
    """theta + sum_i w_i F_i tau_i / sum_i |w_i| F_i, entry by entry (Matena and Raffel 2022).

    Where no expert with a weight has information, all count as if they had the same. |w_i| F_i is taken relative to the
    largest of them: squared gradients of 1e-30 would vanish in products of float32.
    """
    assert p.fisher is not None, "the Fisher method needs the information of every expert"
    merged, total = p.start(), math.fsum(map(abs, p.weights))
    live = [(i, w / total) for i, w in enumerate(p.weights) if w]
    if not live:
        return Weight(merged)
    largest = reduce(torch.maximum, (abs(w) * wide(p.fisher[i]) for i, w in live))
    top, bottom = torch.zeros_like(merged), torch.zeros_like(merged)
    for i, w in live:
        share = torch.where(largest == 0, abs(w), abs(w) * wide(p.fisher[i]) / largest)
        top += p.vector(i).mul_(share).mul_(math.copysign(1, w))
        bottom += share
    return Weight(merged.add_(top.div_(bottom)))


def _products(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, float]:
    """<a, a>, <a, b>, <b, b> in float64, slice by slice."""
    pairs = ((a.view(-1)[part].double(), b.view(-1)[part].double()) for part in slices(a.numel()))
    products = [(float(x @ x), float(x @ y), float(y @ y)) for x, y in pairs]
    return math.fsum(p[0] for p in products), math.fsum(p[1] for p in products), math.fsum(p[2] for p in products)
