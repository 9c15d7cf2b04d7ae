"""Coefficients as the solution of a linear program over predicted effects: the best worst case within limits.

    maximise   t + 10⁻³ · mean over owned behaviours b of G_b(c) / own_b
    subject to G_b(c) ≥ t · own_b                   every behaviour b that an expert answers for, on each half of the prompts
               G_b(c) ≥ −limit_b                    every behaviour with a limit on its damage, on each half
               Σ_j size_j c_j ≤ budget · Σ_j size_j every expert's heads, KV groups and neurons
               0 ≤ c ≤ 1
    with       G_b(c) = G_b(0) + Σ_j E_bj c_j       the predicted gain: what the behaviour's loss falls below the base's

t is the predicted share of its own expert's gain that the worst-off behaviour keeps; the small second term only chooses among
solutions of one t. Everything else of an expert (norms, embeddings) is one more variable, outside the budget. There are as
many fractional coefficients as binding constraints, at most: a few among many thousands. Solved by HiGHS (Huangfu and Hall,
https://doi.org/10.1007/s12532-017-0130-5) through scipy; max-min as a linear program is classical (Boyd and
Vandenberghe, Convex Optimization, §4.3.1). Using it over effects of weight differences is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechmerge.errors import InputError

Array = np.ndarray
SECOND = 1e-3
"""Weight of the mean in the objective, beside the worst case."""
SNAP = 1e-7
"""Coefficients that are nearer to 0 or 1 are 0 or 1."""


@dataclass(frozen=True)
class Program:
    """What is solved.

    V: variables; R: behaviours; S: samples of the effects (halves of the prompts, or one mean); E: experts.
    """

    effects: Array
    """[S, R, V]: drop of each behaviour's loss for each coefficient that goes from 0 to 1."""
    nothing: Array
    """[S, R]: predicted gain at coefficients 0."""
    own: Array
    """[R]: gain of each behaviour's own expert; 0 where it has none (it is protected)."""
    limits: Mapping[int, float]
    """Row → most predicted rise of its loss above the base's."""
    sizes: Array
    """[V]: parameters; 0 for what is outside the budget."""
    expert: Array
    """[V]: number of the expert that a variable belongs to."""
    budget: float = 1.0
    """Share of each expert's parameters, 0 < budget ≤ 1; a coefficient counts in proportion."""


@dataclass(frozen=True)
class Solution:
    """What is best."""

    coefficients: Array
    """float64 [V], 0 … 1."""
    worst: float
    """t: the predicted retained gain of the worst-off behaviour, over all samples."""


def solve_program(program: Program, names: Sequence[str]) -> Solution:
    """Solves it.

    Args:
        program: what is solved.
        names: of the behaviours, for messages.

    Raises:
        InputError: no behaviour has an expert that gains, or no coefficients meet the limits.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, vstack

    samples, _, variables = program.effects.shape
    owned = np.flatnonzero(program.own > 0)
    if not len(owned):
        raise InputError("policy solve", expected="a behaviour whose own expert gains on it", found="none")
    shares = program.effects[:, owned] / program.own[owned][:, None]
    objective = -np.append(SECOND * shares.mean(axis=(0, 1)), 1.0)
    above, most = [], []
    for s in range(samples):
        for i, b in enumerate(owned):
            above.append(np.append(-shares[s, i], 1.0))
            most.append(program.nothing[s, b] / program.own[b])
        for row, limit in program.limits.items():
            scale = max(float(np.abs(program.effects[s, row]).max(initial=0.0)), 1e-12)
            above.append(np.append(-program.effects[s, row], 0.0) / scale)
            most.append((limit + program.nothing[s, row]) / scale)
    blocks = [csr_array(np.stack(above))]
    for e in np.unique(program.expert) if program.budget < 1 else ():
        size = np.where(program.expert == e, program.sizes, 0).astype(np.float64)
        scale = max(float(size.max()), 1.0)  # HiGHS takes very small numbers for 0
        blocks.append(csr_array(np.append(size / scale, 0.0)[None]))
        most.append(program.budget * size.sum() / scale)
    bounds = np.tile([0.0, 1.0], (variables + 1, 1))
    bounds[-1] = [-np.inf, np.inf]
    matrix, right = vstack(blocks, format="csr"), np.array(most)
    # The interior point with crossover takes a third of the simplex's time on 10⁵ variables; where it gives up, that goes on.
    result = linprog(objective, A_ub=matrix, b_ub=right, bounds=bounds, method="highs-ipm")
    if result.status not in (0, 2):
        result = linprog(objective, A_ub=matrix, b_ub=right, bounds=bounds, method="highs")
    if result.status == 2:
        told = ", ".join(f"{names[b]} ≤ {limit:g}" for b, limit in program.limits.items())
        raise InputError("policy solve", expected=f"coefficients within the limits ({told})", found="none", fix="raise a limit")
    if not result.success:
        raise InputError("policy solve", expected="an optimal solution", found=str(result.message))
    found = np.clip(result.x[:-1], 0.0, 1.0)
    found = np.where(found < SNAP, 0.0, np.where(found > 1 - SNAP, 1.0, found))
    return Solution(found, float(result.x[-1]))
