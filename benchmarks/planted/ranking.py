"""How well a ranking finds the positives: average precision and precision at k, ties shared fairly."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
DRAWS = 400


def average_precision(scores: Array, positive: Array) -> float:
    """Σ over thresholds of precision × gain of recall; items of equal score enter together (as scikit-learn defines it).

    Args:
        scores: [n], higher is ranked first.
        positive: [n], true where an item should be found.

    Raises:
        ValueError: no positive, or a score that is not a number.
    """
    if not positive.any() or np.isnan(scores).any():
        raise ValueError("average precision needs a positive and finite scores")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    recall = hits[last] / hits[-1]
    return float(np.sum(hits[last] / (last + 1) * np.diff(recall, prepend=0.0)))


def precision_at(scores: Array, positive: Array, k: int) -> float:
    """Share of positives among the best k; of items tied across the k-th place, what a fair draw would give."""
    kth = np.sort(scores)[::-1][k - 1]
    above, tied = scores > kth, scores == kth
    share = (k - above.sum()) / tied.sum()
    return float((positive[above].sum() + share * positive[tied].sum()) / k)


def chance(positive: Array, k: int, seed: int) -> tuple[float, float]:
    """Average precision and precision at k of random orders, means of `DRAWS` draws."""
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(len(positive)).astype(float) for _ in range(DRAWS)]
    return (
        float(np.mean([average_precision(scores, positive) for scores in orders])),
        float(np.mean([precision_at(scores, positive, k) for scores in orders])),
    )
