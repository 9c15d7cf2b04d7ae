"""Intervals that hold for few clusters too.

A percentile interval of few clusters is too narrow: the bootstrap's variance is (n − 1)/n of what it should be, and the t
distribution of n − 1 degrees of freedom is wider than the normal one. Its levels are expanded for both (Hesterberg, What
Teachers Should Know About the Bootstrap, 2015, §3.3, https://arxiv.org/abs/1411.5279). Clusters are whatever is independent:
topics, mostly.

A percentile interval never leaves the range of the clusters, though: of four clusters of nothing all are above 0 one time in
sixteen. So where bounds license something, no end lies nearer than that of the t interval (`t_half`).
"""

from __future__ import annotations

import math

TAIL = 0.025
"""What a 95 % interval leaves out on either side."""


def levels(clusters: int, tail: float = TAIL) -> tuple[float, float]:
    """Lower and upper level of the percentile interval.

    Args:
        clusters: independent clusters, at least 1. One bounds nothing: its levels are 0 and 1.
        tail: what is left out on either side.
    """
    from scipy.special import ndtr, stdtrit

    if clusters == 1:
        return 0.0, 1.0
    low = float(ndtr(math.sqrt(clusters / (clusters - 1)) * stdtrit(clusters - 1, tail)))
    return low, 1 - low


def t_half(clusters: int, error: float, tail: float = TAIL) -> float:
    """Half the width of the t interval.

    Args:
        clusters: independent clusters, at least 2.
        error: standard error of the mean, from these clusters.
        tail: what is left out on either side.
    """
    from scipy.special import stdtrit

    return float(stdtrit(clusters - 1, 1 - tail)) * error
