"""Which components each set of the curves holds, and what the curves say together (numbers only, no model).

A score order is judged as feature attributions are: insert the best components first and compare the area under the curve
with that of other orders (insertion curves, Petsiuk et al., "RISE", https://arxiv.org/abs/1806.07421). Ours: the controls hold
as many components of each kind as the score's set, so sets of one share have the same number of parameters. Components are
ordered by the score itself, not per parameter: a head goes in before the many neurons that it outweighs, in the controls as
well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator

from mechmerge.intervals import levels, t_half
from mechmerge.localize.curve_record import Lift
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import UNIT_KINDS

Array = np.ndarray
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the components below the anchor that are moved."""
OUTPUT_SHARES = (0.05, 0.2, 1.0)
"""Where the orders are compared on the output unless told otherwise."""
Order = tuple[Literal["score", "random", "magnitude"], int | None]
"""(`score`, `random` or `magnitude`; seed of a random order)."""
Sets = Mapping[str, Array]
"""kind → [layers below the anchor, units]: the first point (1 … len(SHARES)) whose set holds the component."""


def _known(shares: tuple[float, ...]) -> tuple[float, ...]:
    if unknown := set(shares) - set(SHARES):
        raise ValueError(f"{min(unknown):g} is not one of {', '.join(f'{share:g}' for share in SHARES)}")
    return shares


Shares = Annotated[tuple[float, ...], AfterValidator(_known)]
"""Some of `SHARES`, as a setting."""


def set_orders(file: ScoreFile, seeds: Sequence[int]) -> dict[Order, Sets]:
    """The nested sets of the score order and of its controls.

    Args:
        file: a score file with its delta norms; components at or above its anchor's layer take no part.
        seeds: one random order each.
    """
    below = file.depth
    scores: dict[str, Array] = {kind: file.score(kind)[:below] for kind in UNIT_KINDS}
    best = _by_score(scores)
    orders: dict[Order, Sets] = {("score", None): best}
    for seed in seeds:
        generator = np.random.default_rng(seed)
        orders["random", seed] = {kind: _like(best[kind], generator.permutation(best[kind].size)) for kind in UNIT_KINDS}
    norms = {kind: file.arrays[f"{kind}.delta_norm"][:below] for kind in UNIT_KINDS}
    largest = {kind: np.argsort(-norms[kind], axis=None, kind="stable") for kind in UNIT_KINDS}
    orders["magnitude", None] = {kind: _like(best[kind], largest[kind]) for kind in UNIT_KINDS}
    return orders


def _by_score(scores: Mapping[str, Array]) -> Sets:
    together = np.concatenate([scores[kind].ravel() for kind in UNIT_KINDS])
    order = np.argsort(-together, kind="stable")
    sizes = [max(1, round(share * len(order))) for share in SHARES]
    first = np.zeros(len(order), np.int64)
    for point, (start, stop) in enumerate(zip([0, *sizes], sizes, strict=False), 1):
        first[order[start:stop]] = point
    ends = np.cumsum([scores[kind].size for kind in UNIT_KINDS])[:-1]
    parts = np.split(first, ends)
    return {kind: part.reshape(scores[kind].shape) for kind, part in zip(UNIT_KINDS, parts, strict=True)}


def _like(model: Array, order: Array) -> Array:
    """Sets of one kind with the counts of `model`, filled in the given order of flat indices."""
    first = np.empty(model.size, np.int64)
    first[order] = np.sort(model, axis=None)
    return first.reshape(model.shape)


def counts(sets: Sets, parameters: Mapping[str, Array]) -> list[tuple[int, int]]:
    """(components, parameters) of each point's set, the empty one first.

    Args:
        sets: one order's sets.
        parameters: `<kind>.parameters` → [layers], as a score file holds them.
    """
    found = []
    for point in range(len(SHARES) + 1):
        taken = {kind: (first <= point).sum(1) for kind, first in sets.items()}
        total = sum(int(n @ parameters[f"{kind}.parameters"][: len(n)]) for kind, n in taken.items())
        found.append((sum(int(n.sum()) for n in taken.values()), total))
    return found


def area(curves: Array) -> Array:
    """Area under curves over share 0 … 1 by the trapezoid rule: [..., points, n] → [..., n], the base first."""
    steps = np.diff([0.0, *SHARES])[:, None]
    areas: Array = (steps * (curves[..., 1:, :] + curves[..., :-1, :]) / 2).sum(-2)
    return areas


def advantage(differences: Array, weights: Array, topics: Sequence[str], seed: int, resamples: int = 2000) -> Lift:
    """Σ differences / Σ weights over the prompts, mean over the control orders, with its 95 % interval.

    Two things vary: the prompts (bootstrap of paired differences over whole topics; for few of them see mechmerge/intervals.py)
    and, with several control orders, the luck of a draw: a score that means nothing is one more random order, and differs from
    the mean of k others by s·√(1 + 1/k) (a t interval with k − 1 degrees of freedom; s, the standard deviation between the
    orders). The two half widths are added in quadrature.

    Args:
        differences: score less control (positive: the score is better), [control orders, n].
        weights: of each prompt, [n].
        topics: topic of each prompt.
        seed: of the bootstrap.
    """
    names, where = np.unique(np.array(topics), return_inverse=True)
    sizes, sums = np.bincount(where, weights), np.bincount(where, differences.mean(0))
    picks = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    low, high = map(float, np.quantile(sums[picks].sum(1) / sizes[picks].sum(1), levels(len(names))))
    orders = differences.sum(1) / weights.sum()
    value, k, n = float(orders.mean()), len(orders), len(names)
    if n == 1:  # bounds nothing
        low, high = min(low, 0.0), max(high, 0.0)
    else:
        half = t_half(n, float(np.sqrt(n / (n - 1) * np.square(sums - value * sizes).sum()) / sizes.sum()))
        low, high = min(low, value - half), max(high, value + half)
    luck = t_half(k, float(orders.std(ddof=1) * np.sqrt(1 + 1 / k))) if k > 1 else 0.0
    return Lift(value=value, low=value - float(np.hypot(value - low, luck)), high=value + float(np.hypot(high - value, luck)))
