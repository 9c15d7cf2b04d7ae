"""Screening along the straight path between two checkpoints instead of at the base alone.

    score_c = ∫₀¹ ⟨∂s/∂θ_c |θ_b + tδ, δ_c⟩ dt   with δ = θ_e − θ_b

The scores of all components add up to s(θ_e) − s(θ_b) ("completeness"): integrated gradients (Sundararajan et al. 2017,
https://arxiv.org/abs/1703.01365), here in the weights. Weight patching (arXiv 2604.13694 §III-D) screens at the base; the path
is ours. The midpoint rule has an error of the order 1/M², needs neither end, and one node of it costs what a screen at the
base costs. Memory stays at one model plus a tensor of each checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mechmerge.localize.bench import Bench

Array = np.ndarray
Source = Callable[[str], torch.Tensor]


def along_path(
    bench: Bench, base: Source, expert: Source, steps: int, measure: Callable[[Source | None], dict[str, Array]]
) -> dict[str, Array]:
    """A first-order measure, averaged over the midpoints of equal pieces of the path from the base to the expert.

    Args:
        bench: the base. Its weights are moved and, whatever happens, put back: every bit is as before.
        base: the base's tensor by name.
        expert: the expert's tensor by name.
        steps: pieces of the path; 0 measures at the base, without moving anything.
        measure: measures with the weights as they stand; given where differences to the expert start, None for where the bench
            stands.
    """
    if steps == 0:
        return measure(None)
    total: dict[str, Array] = {}
    try:
        for step in range(steps):
            bench.load(_between(base, expert, (step + 0.5) / steps))
            for kind, values in measure(base).items():
                total[kind] = total.get(kind, np.zeros_like(values)) + values / steps
    finally:
        bench.load(base)
    return total


def _between(base: Source, expert: Source, share: float) -> Source:
    """The tensor by name at a share of the way from the base to the expert, in float32."""

    def read(name: str) -> torch.Tensor:
        start = base(name).float()
        return start + share * (expert(name).float() - start)

    return read
