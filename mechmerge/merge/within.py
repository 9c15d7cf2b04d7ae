"""TIES (https://arxiv.org/abs/2306.01708) and DARE-TIES (https://arxiv.org/abs/2311.03099) inside a mask.

For one tensor, with δ_e = expert − base, w_e the expert's weight times its coefficients (rows or columns of components), and
inside_e where w_e ≠ 0:

    keep_e   TIES: the ⌊density · |inside_e|⌋ largest |δ_e| of inside_e, at least one; DARE: each of inside_e with
             probability density
    x_e      w_e · keep_e · δ_e, under DARE scaled by Σ_inside |δ_e| / Σ_inside keep_e |δ_e|
    s        sign of Σ_e x_e (0 counts as +)
    merged   base + Σ_e x_e [sign x_e = s], under TIES divided by Σ_e w_e [sign x_e = s] (1 where that is 0)

What lies outside takes no part in shares, signs or scales. With coefficients 1 everywhere it is what mergekit 0.1.5 calls
`ties` and `dare_ties`, whose choices (scaling by the sum of sizes, at least one element) are followed. Confining
them to components is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SMALL = 1e-7
"""Sums of sizes below this are not divided by."""


def merge_within(
    deltas: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], densities: Sequence[float], *, drawn: bool, normalize: bool
) -> torch.Tensor:
    """What is added to the base.

    Args:
        deltas: expert − base of each expert, of one shape, float32.
        weights: weight times coefficients of each, broadcast to that shape.
        densities: share of what is inside that is kept of each, 0 … 1.
        drawn: DARE (drawn from torch's generator, expert after expert) in the place of TIES.
        normalize: divide by the weights of the experts that agree.
    """
    parts = []
    for delta, weight, density in zip(deltas, weights, densities, strict=True):
        inside = (weight != 0).expand_as(delta)
        parts.append((_drawn if drawn else _largest)(delta, inside, density) * weight)
    stacked = torch.stack(parts)
    sign = torch.where(stacked.sum(dim=0) >= 0, 1.0, -1.0)
    agree = (stacked.sign() == sign).to(stacked.dtype)
    total = (stacked * agree).sum(dim=0)
    if normalize:
        divisor = (torch.stack([weight.expand_as(deltas[0]) for weight in weights]) * agree).sum(dim=0)
        total /= torch.where(divisor == 0, 1.0, divisor)
    return total


def _largest(delta: torch.Tensor, inside: torch.Tensor, density: float) -> torch.Tensor:
    """The delta with all but the largest part of what is inside at 0."""
    count = int(inside.sum())
    if density >= 1:
        return delta * inside
    if density <= 0 or count == 0:
        return torch.zeros_like(delta)
    sizes = torch.where(inside, delta.abs(), -1.0).reshape(-1)
    keep = torch.zeros_like(sizes)
    keep[torch.argsort(sizes, descending=True)[: max(1, int(density * count))]] = 1
    return delta * keep.reshape(delta.shape)


def _drawn(delta: torch.Tensor, inside: torch.Tensor, density: float) -> torch.Tensor:
    """The delta with a random part of what is inside at 0, scaled to the sum of sizes that it had there."""
    own = delta * inside
    if density >= 1:
        return own
    kept = own * torch.bernoulli(torch.full_like(delta, density))
    before, after = own.abs().sum(), kept.abs().sum()
    return kept if before < SMALL or after < SMALL else kept * (before / after)
