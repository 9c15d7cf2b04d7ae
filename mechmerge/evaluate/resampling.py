"""What intervals are computed from: sums by cluster, resampled means, score intervals (see statistics.py)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mechmerge.evaluate.columns import Column
from mechmerge.intervals import TAIL

Array = NDArray[np.float64]
KEPT = 4_000_000
"""Weights (of 8 bytes) that are worth keeping: metrics over the same clusters, and all their pairs, have the same resamples."""


class Layout:
    """The clusters and groups of a column's units, and what follows from them for any values of these units."""

    counts: Array
    """Units, [clusters, groups]."""
    clusters: int

    def __init__(self, column: Column) -> None:
        cluster, group = _codes(column.clusters), _codes(column.groups)
        self.clusters, groups = int(cluster.max()) + 1, int(group.max()) + 1
        self._shape = (self.clusters, groups)
        self._place = cluster * groups + group
        self.counts = self.sums(np.ones(len(column.values)))

    def sums(self, values: Array | Sequence[float]) -> Array:
        """Sums of one value a unit, [clusters, groups]."""
        flat: Array = np.bincount(self._place, values, self._shape[0] * self._shape[1]).astype(np.float64)
        return flat.reshape(self._shape)

    def mean(self, values: Array | Sequence[float]) -> float:
        """The mean over groups of the groups' means."""
        return float(_combine(self.sums(values).sum(0), self.counts.sum(0)))

    def spread(self, values: Array) -> float:
        """Variance of one unit."""
        return max(0.0, self.mean(values**2) - self.mean(values) ** 2)

    def effective(self, values: Array, clusters: int) -> float:
        """The number of independent units whose mean would vary as much as that of so many clusters; at most all units."""
        if self.clusters == 1:
            return 1.0
        sums, held = self.sums(values), self.counts.sum(0)
        parts = ((sums - sums.sum(0) / held * self.counts) / held).mean(1)
        variance = self.clusters / (self.clusters - 1) * float(parts @ parts)
        units = min(float(held.sum()), self.spread(values) / variance) if variance > 0 else self.clusters
        return units * clusters / self.clusters

    def bootstrap(self, values: Array, seed: int, resamples: int, clusters: int) -> Array:
        """The means of resamples of so many clusters, [resamples]; equal seeds draw equal clusters."""
        draw = _weights if self.clusters * resamples <= KEPT else _weights.__wrapped__
        weights = draw(self.clusters, clusters, seed, resamples)
        return _combine(weights @ self.sums(values), weights @ self.counts)


@functools.lru_cache(maxsize=8)
def _weights(held: int, drawn: int, seed: int, resamples: int) -> Array:
    """How often each of the clusters held is among those drawn, [resamples, held]; nobody may write into it."""
    found = np.random.default_rng(seed).multinomial(drawn, np.full(held, 1 / held), size=resamples).astype(np.float64)
    found.flags.writeable = False
    return found


def wilson(layout: Layout, values: Array, units: float, clusters: int, tail: float = TAIL) -> tuple[float, float]:
    """Wilson's interval of the mean of values 0 … 1.

    Args:
        layout: where the values belong.
        values: one a unit; where they are not 0 and 1, `units` counts for as much more as they vary less.
        units: effective number of units.
        clusters: how many clusters there are: degrees of freedom.
        tail: what is left out on either side.
    """
    from scipy.special import stdtrit

    if clusters == 1:
        return 0.0, 1.0
    rate, spread = layout.mean(values), layout.spread(values)
    q = float(stdtrit(clusters - 1, 1 - tail))
    n = units * (rate * (1 - rate) / spread if spread > 1e-12 else 1.0)
    scale = 1 + q * q / n
    middle = (rate + q * q / (2 * n)) / scale
    half = q / scale * float(np.sqrt(max(0.0, rate * (1 - rate)) / n + q * q / (4 * n**2)))
    return middle - half, middle + half


def newcombe(layout: Layout, difference: Array, clusters: int) -> tuple[float, float]:
    """Newcombe's interval of a mean difference −1 … 1, from Wilson's of what was won and of what was lost."""
    units = layout.effective(difference, clusters)
    parts = np.maximum(difference, 0), np.maximum(-difference, 0)
    won, lost = (layout.mean(part) for part in parts)
    (won_low, won_high), (lost_low, lost_high) = (wilson(layout, part, units, clusters) for part in parts)
    # Gains and losses exclude one another: their rates are negatively correlated.
    r = float(np.sqrt(won * lost / ((1 - won) * (1 - lost)))) if max(won, lost) < 1 else 0.0
    down, up = (won - won_low, lost_high - lost), (won_high - won, lost - lost_low)
    below, above = (float(np.sqrt(a * a + b * b + 2 * r * a * b)) for a, b in (down, up))
    return max(-1.0, won - lost - below), min(1.0, won - lost + above)


def exact(passed: bool, n: int, tail: float = TAIL) -> tuple[float, float]:
    """Clopper-Pearson interval where all or none of n clusters pass."""
    edge = tail ** (1 / n)
    return (edge, 1.0) if passed else (0.0, 1 - edge)


def _codes(labels: Sequence[str]) -> NDArray[np.int64]:
    """Labels as numbers 0 … k-1 in order of appearance."""
    known = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([known[label] for label in labels], dtype=np.int64)


def _combine(sums: Array, counts: Array) -> Array:
    """Mean over groups (the last axis) of the groups' means; a group without units is left out."""
    rates = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return np.asarray(np.nanmean(rates, axis=-1))
