"""Certainty of pass rates: cluster bootstrap, paired bootstrap, McNemar's exact test, sign flips, Holm's correction.

Answers to prompts of one topic, and instructions of one prompt, are not independent, so clusters are resampled (cluster
bootstrap: Davison and Hinkley, Bootstrap Methods and their Application, 1997, §3.8). Models are compared on the same resamples.

A plain percentile interval of few clusters is too narrow (coverage .84 … .91 at 12 topics in our simulation), so its levels
are expanded (t quantiles and n/(n − 1): Hesterberg, What Teachers Should Know About the Bootstrap, 2015, §3.3,
https://arxiv.org/abs/1411.5279), and the interval of a rate is never narrower at either end than Wilson's (1927) with
the effective number of units
that the clusters leave (the design effect: Korn and Graubard 1998).
Where all pass or all fail, or no unit differs, nothing can be resampled: there the interval is the exact binomial one over
clusters (Clopper and Pearson), each counted once.

Exact McNemar: https://doi.org/10.1007/BF02295996. Sign flips of clusters: Good, Permutation Tests, 2000, §3.2, with the
(b + 1)/(m + 1) rule of Phipson and Smyth (https://arxiv.org/abs/1603.05766). Holm: https://www.jstor.org/stable/4615733.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mechmerge.evaluate.columns import Column

Array = NDArray[np.float64]
LEVEL = 0.95
EXACT_FLIPS = 14
"""Up to so many clusters that differ, all their sign flips are enumerated."""
FLIPS = 9999
"""Random sign flips where there are more."""


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


class Tables(NamedTuple):
    """A column summed up by cluster and group, all that statistics need."""

    sums: Array
    """[clusters, groups]"""
    counts: Array
    """Units, [clusters, groups]."""


def tables(column: Column, values: Sequence[float] | None = None) -> Tables:
    """Sums of a column's outcomes (or of other values of its units) and numbers of units, both [clusters, groups]."""
    (c, n_clusters), (g, n_groups) = _codes(column.clusters), _codes(column.groups)
    sums, counts = np.zeros((n_clusters, n_groups)), np.zeros((n_clusters, n_groups))
    np.add.at(sums, (c, g), np.asarray(column.values if values is None else values, dtype=np.float64))
    np.add.at(counts, (c, g), 1.0)
    return Tables(sums, counts)


def interval(column: Column, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """The mean of a column (over its groups, or of its worst group) with its 95 % interval.

    Args:
        column: outcomes 0 … 1.
        seed: equal seeds and clusters give equal resamples.
        resamples: number of resamples.
    """
    sums, counts = tables(column)
    value = float(_combine(sums.sum(0), counts.sum(0), column.over))
    if sums.sum() in (0.0, counts.sum()):
        return Interval(value, *_exact(value > 0, len(sums)))
    low, high = np.quantile(_resampled(sums, counts, column.over, seed, resamples), _levels(len(sums)))
    if column.over == "mean":
        wilson = _wilson(sums, counts, value)
        low, high = min(low, wilson[0]), max(high, wilson[1])
    elif value == 0:
        failing = [int((counts[:, g] > 0).sum()) for g in range(counts.shape[1]) if sums[:, g].sum() == 0]
        high = max(high, min(_exact(False, n)[1] for n in failing))
    return Interval(value, float(np.clip(low, 0, value)), float(np.clip(high, value, 1)))


def paired(column: Column, other: Column, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Difference of two means over the same units, with the 95 % interval of the paired cluster bootstrap.

    Where no unit differs the interval is that of an event seen in none of the clusters, in both directions.
    """
    difference = [a - b for a, b in zip(column.values, other.values, strict=True)]
    sums, counts = tables(column, difference)
    value = float(_combine(sums.sum(0), counts.sum(0), "mean"))
    if not any(difference):
        unseen = _exact(False, len(sums))[1]
        return Interval(0.0, -unseen, unseen)
    low, high = np.quantile(_resampled(sums, counts, "mean", seed, resamples), _levels(len(sums)))
    return Interval(value, float(min(low, value)), float(max(high, value)))


def retained(merged: Column, base: Column, expert: Column, *, seed: int = 0, resamples: int = 2000) -> Interval | None:
    """The share of an expert's gain that a merge keeps, (merged − base) / (expert − base), with its 95 % interval.

    All three are resampled together. None where the lower end of the expert's gain is not above 0: a share of no gain
    is not defined.
    """
    if paired(expert, base, seed=seed, resamples=resamples).low <= 0:
        return None
    made = [tables(merged, [a - b for a, b in zip(column.values, base.values, strict=True)]) for column in (merged, expert)]
    counts = made[0].counts
    point = [float(_combine(table.sums.sum(0), counts.sum(0), "mean")) for table in made]
    kept, gained = (_resampled(table.sums, counts, "mean", seed, resamples) for table in made)
    shares = np.divide(kept, gained, out=np.full_like(kept, -np.inf), where=gained > 0)
    low, high = np.quantile(shares, _levels(len(counts)), method="closest_observation")
    return Interval(point[0] / point[1], float(low), float(high))


def p_value(column: Column, other: Column, *, seed: int = 0) -> tuple[float, Literal["mcnemar", "sign-flip"]]:
    """Two-sided p of no difference between two columns over the same units, and the test that gave it.

    Pass or fail of independent units: the exact McNemar test. Else the sign of every cluster's difference is flipped: all ways
    where few clusters differ, drawn ones otherwise.
    """
    difference = np.array(column.values) - np.array(other.values)
    independent = len(set(column.clusters)) == len(column.clusters)
    if independent and set(column.values) | set(other.values) <= {0.0, 1.0}:
        return mcnemar(int((difference > 0).sum()), int((difference < 0).sum())), "mcnemar"
    sums, counts = tables(column, list(difference))
    # What a cluster adds to the mean over groups of the groups' means.
    parts = (sums / counts.sum(0)).sum(1) / counts.shape[1]
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


# ------------------------------------------------------------------------------------------------------------------- parts
def _codes(labels: Sequence[str]) -> tuple[NDArray[np.int64], int]:
    """Labels as numbers 0 … k-1 in order of appearance, and k."""
    known = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([known[label] for label in labels], dtype=np.int64), len(known)


def _combine(sums: Array, counts: Array, over: Literal["mean", "min"]) -> Array:
    """Mean or minimum over groups (the last axis) of the groups' means; a group without units is left out."""
    rates = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return np.asarray(np.nanmean(rates, axis=-1) if over == "mean" else np.nanmin(rates, axis=-1))


def _resampled(sums: Array, counts: Array, over: Literal["mean", "min"], seed: int, resamples: int) -> Array:
    """The combined mean of each resample of the clusters, [resamples]."""
    n = len(sums)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    return _combine(weights @ sums, weights @ counts, over)


def _levels(clusters: int) -> tuple[float, float]:
    """Expanded levels of the percentile interval for so many clusters."""
    from scipy.stats import norm, t

    if clusters == 1:
        return 0.0, 1.0
    tail = float(norm.cdf(np.sqrt(clusters / (clusters - 1)) * t.ppf((1 - LEVEL) / 2, clusters - 1)))
    return tail, 1 - tail


def _wilson(sums: Array, counts: Array, value: float) -> tuple[float, float]:
    """Wilson's interval with the number of independent units that would have the clusters' variance."""
    from scipy.stats import t

    clusters = len(sums)
    if clusters == 1:
        return 0.0, 1.0
    held, rates = counts.sum(0), sums.sum(0) / counts.sum(0)
    parts = ((sums - rates * counts) / held).sum(1) / len(held)
    variance = clusters / (clusters - 1) * float(parts @ parts)
    units = float(counts.sum())
    effective = min(units, value * (1 - value) / variance) if variance > 0 else float(clusters)
    q = float(t.ppf((1 + LEVEL) / 2, clusters - 1))
    scale = 1 + q * q / effective
    middle = (value + q * q / (2 * effective)) / scale
    half = q / scale * float(np.sqrt(value * (1 - value) / effective + q * q / (4 * effective**2)))
    return middle - half, middle + half


def _exact(passed: bool, n: int) -> tuple[float, float]:
    """Clopper-Pearson interval where all or none of n clusters pass."""
    from scipy.stats import binomtest

    exact = binomtest(n if passed else 0, n).proportion_ci(LEVEL, method="exact")
    return float(exact.low), float(exact.high)
