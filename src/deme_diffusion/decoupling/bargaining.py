"""The Nash bargaining solution of several tasks' gradients: NashMTL (Navon et al. 2022), by one convex problem."""

from __future__ import annotations

import torch

MOST_STEPS = 200
CLOSE = 1e-13
RIDGE = 1e-12
"""Added to the gradients' squared cosines with themselves: where they cancel out, no finite weights are best."""


def gram(gradients: list[list[torch.Tensor]]) -> torch.Tensor:
    """G^T G of K gradients, each a list over the parameters: (K, K) float64 inner products."""
    stacked = (torch.stack([part.double().flatten() for part in same]) for same in zip(*gradients, strict=True))
    return torch.stack([rows @ rows.T for rows in stacked]).sum(0)


def bargained(products: torch.Tensor) -> torch.Tensor:
    """The alpha > 0 with G^T G alpha = 1 / alpha, elementwise (Navon et al. 2022, Sec. 3): (K, K) -> (K,), float64.

    It is where 1/2 alpha^T G^T G alpha - sum_k log alpha_k is least. That is self-concordant, so that Newton's steps,
    divided by 1 plus their decrement, always get there. The paper's code solves a series of approximations instead.
    """
    lengths = products.diagonal().sqrt()
    # Alpha in units of 1 / length, so that nothing depends on the scale of the losses.
    cosines = products / lengths.outer(lengths) + RIDGE * torch.eye(len(lengths), dtype=products.dtype)
    alpha = torch.ones_like(lengths)
    for _ in range(MOST_STEPS):
        slope = cosines @ alpha - 1 / alpha
        step = torch.linalg.solve(cosines + torch.diag(alpha.square().reciprocal()), slope)
        decrement = float((slope @ step).clamp(min=0).sqrt())
        if decrement < CLOSE:
            break
        alpha = alpha - (step / (1 + decrement) if decrement > 0.25 else step)
    return alpha / lengths
