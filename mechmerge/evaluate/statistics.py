"""Certainty of pass rates: cluster bootstrap, paired bootstrap, McNemar's exact test, sign flips, Holm's correction.

Answers to prompts of one topic, and instructions of one prompt, are not independent, so clusters are resampled (cluster
bootstrap: Davison and Hinkley, Bootstrap Methods and their Application, 1997, §3.8). Models are compared on the same resamples.

A percentile interval of few clusters, or of few units that differ, is too narrow: in `benchmarks/statistics_check.py` it covers
.84 … .91 at 12 topics, and a gate on its lower end accepted one difference too many in seven. So its levels are expanded
(mechmerge/intervals.py), and no end lies nearer than that of a score interval: Wilson's (1927) for a rate, Newcombe's
(Statistics in Medicine 17, 2635-2650, 1998, method 10) for a paired difference, both with the effective number of units that
clusters leave (the design effect: Korn and Graubard 1998). Where all pass or all fail, or no unit differs, the interval is the
exact binomial one over clusters (Clopper and Pearson), each counted once.

Exact McNemar: https://doi.org/10.1007/BF02295996. Sign flips of clusters: Good, Permutation Tests, 2000, §3.2, with the
(b + 1)/(m + 1) rule of Phipson and Smyth (https://arxiv.org/abs/1603.05766). Holm: https://www.jstor.org/stable/4615733.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.resampling import Array, Layout, exact, newcombe, wilson
from mechmerge.intervals import TAIL, levels

EXACT_FLIPS = 14
"""Up to so many clusters that differ, all their sign flips are enumerated."""
FLIPS = 9999
"""Random sign flips where there are more."""


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def interval(column: Column, *, seed: int = 0, resamples: int = 2000, clusters: int | None = None) -> Interval:
    """The mean of a column (over its groups, or of its worst group) with its 95 % interval.

    Args:
        column: outcomes 0 … 1.
        seed: equal seeds and clusters give equal resamples.
        resamples: number of resamples.
        clusters: the interval as it would be with so many clusters like these (default: as many as there are).
    """
    if column.over == "min":
        return _worst(column, seed, resamples, clusters)
    return _rate(column, (TAIL, TAIL), seed, resamples, clusters)


def _rate(column: Column, tails: tuple[float, float], seed: int, resamples: int, clusters: int | None) -> Interval:
    """The interval of a mean that leaves out so much below and above."""
    layout, values = Layout(column), np.array(column.values)
    size = clusters or layout.clusters
    value = layout.mean(values)
    if not values.any() or (values == 1).all():
        return Interval(value, exact(value > 0, size, tails[0])[0], exact(value > 0, size, tails[1])[1])
    drawn, units = layout.bootstrap(values, seed, resamples, size), layout.effective(values, size)
    low, high = (
        (float(np.quantile(drawn, levels(size, tail)[side])), wilson(layout, values, units, size, tail)[side])
        for side, tail in enumerate(tails)
    )
    return Interval(value, min(value, max(0.0, min(low))), max(value, min(1.0, max(high))))


def _worst(column: Column, seed: int, resamples: int, clusters: int | None) -> Interval:
    """The worst group: the least of the lower ends and, as it is picked among the groups, of Bonferroni's upper ends."""
    names = list(dict.fromkeys(column.groups))
    total = len(set(column.clusters))
    found = []
    for name in names:
        kept = [i for i, group in enumerate(column.groups) if group == name]
        part = Column([column.values[i] for i in kept], [column.clusters[i] for i in kept], [name] * len(kept))
        size = None if clusters is None else max(1, round(len(set(part.clusters)) * clusters / total))
        found.append(_rate(part, (TAIL, TAIL / len(names)), seed, resamples, size))
    return Interval(*(min(ends) for ends in zip(*found, strict=True)))


def paired(
    column: Column, other: Column, *, times: float = 1.0, seed: int = 0, resamples: int = 2000, clusters: int | None = None
) -> Interval:
    """Difference of two means over the same units, with its 95 % interval.

    Where no unit differs the interval is that of an event seen in none of the clusters, in both directions.

    Args:
        column: outcomes 0 … 1.
        other: those of the other model, in the same order.
        times: what the other's are multiplied by; above 0.
        seed: equal seeds and clusters give equal resamples.
        resamples: number of resamples.
        clusters: the interval as it would be with so many clusters like these.
    """
    difference = np.subtract(column.values, times * np.array(other.values))
    layout = Layout(column)
    size = clusters or layout.clusters
    return _difference(layout, difference, layout.bootstrap(difference, seed, resamples, size), max(1.0, times), size)


def _difference(layout: Layout, difference: Array, drawn: Array, most: float, size: int) -> Interval:
    """Interval of the mean of differences −most … most, whose bootstrap drew these means."""
    if not difference.any():
        unseen = most * exact(False, size)[1]
        return Interval(0.0, -unseen, unseen)
    value = layout.mean(difference)
    low, high = map(float, np.quantile(drawn, levels(size)))
    score = newcombe(layout, difference / most, size)
    return Interval(value, min(low, most * score[0]), max(high, most * score[1]))


def apart(mine: Interval, other: Interval, times: float = 1.0) -> Interval:
    """Difference of two figures that cannot be paired (other units, or worst groups); wider than 95 % asks for."""
    return Interval(mine.value - times * other.value, mine.low - times * other.high, mine.high - times * other.low)


def retained(
    merged: Column, base: Column, expert: Column, *, seed: int = 0, resamples: int = 2000, clusters: int | None = None
) -> Interval | None:
    """The share of an expert's gain that a merge keeps, (merged − base) / (expert − base), with its 95 % interval.

    The interval holds the shares r for which merged − base − r (expert − base) may be 0 (Fieller 1954). None where the lower
    end of the expert's gain is not above 0: a share of no gain is not defined.
    """
    gain = paired(expert, base, seed=seed, resamples=resamples, clusters=clusters)
    if gain.low <= 0:
        return None
    kept, gained = (np.subtract(column.values, base.values) for column in (merged, expert))
    layout = Layout(base)
    size = clusters or layout.clusters
    drawn = [layout.bootstrap(part, seed, resamples, size) for part in (kept, gained)]

    def left(share: float) -> Interval:
        most = max(1.0, abs(share), abs(1 - share))
        return _difference(layout, kept - share * gained, drawn[0] - share * drawn[1], most, size)

    share = layout.mean(kept) / layout.mean(gained)
    return Interval(share, _root(lambda r: left(r).low, share, -1.0), _root(lambda r: left(r).high, share, 1.0))


def _root(end: Callable[[float], float], inside: float, step: float) -> float:
    """Where a falling function crosses 0: sought from `inside` in the direction of `step`, to .0005 on the far side."""
    side = 1.0 if step > 0 else -1.0
    outside = inside + step
    while side * end(outside) > 0:
        step *= 2
        inside, outside = outside, outside + step
    while abs(outside - inside) > 5e-4:
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if side * end(middle) > 0 else (inside, middle)
    return outside


def p_value(column: Column, other: Column, *, seed: int = 0) -> tuple[float, Literal["mcnemar", "sign-flip"]]:
    """Two-sided p of no difference between two columns over the same units, and the test that gave it.

    Pass or fail of independent units: the exact McNemar test. Else the sign of every cluster's difference is flipped: all ways
    where few clusters differ, drawn ones otherwise.
    """
    difference = np.array(column.values) - np.array(other.values)
    independent = len(set(column.clusters)) == len(column.clusters)
    if independent and set(column.values) | set(other.values) <= {0.0, 1.0}:
        return mcnemar(int((difference > 0).sum()), int((difference < 0).sum())), "mcnemar"
    layout = Layout(column)
    # What a cluster adds to the mean over groups of the groups' means.
    parts = (layout.sums(difference) / layout.counts.sum(0)).mean(1)
    parts = parts[parts != 0]
    if not len(parts):
        return 1.0, "sign-flip"
    seen = abs(parts.sum()) * (1 - 1e-12)  # sums of one set in another order differ in the last digit
    if len(parts) <= EXACT_FLIPS:
        signs = np.array(list(itertools.product((1, -1), repeat=len(parts))))
        return float((np.abs(signs @ parts) >= seen).mean()), "sign-flip"
    signs = np.random.default_rng(seed).choice((1.0, -1.0), (FLIPS, len(parts)))
    return float(((np.abs(signs @ parts) >= seen).sum() + 1) / (FLIPS + 1)), "sign-flip"


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p of McNemar's test, from the units that only one of two models passes (1 where there are none)."""
    from scipy.stats import binomtest

    return 1.0 if better + worse == 0 else min(1.0, float(binomtest(better, better + worse, 0.5).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's step-down method, in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
