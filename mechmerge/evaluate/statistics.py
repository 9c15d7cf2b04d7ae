"""Certainty of pass rates: cluster bootstrap, paired bootstrap, McNemar's exact test, Holm's correction.

Answers to prompts of one topic are not independent, so topics are resampled, not prompts (cluster bootstrap: Davison and
Hinkley, Bootstrap Methods and their Application, 1997, §3.8). Two models are compared on the same resamples. Exact McNemar:
a two-sided binomial test of the discordant prompts (https://doi.org/10.1007/BF02295996). Holm: https://www.jstor.org/stable/4615733.

Where all answers pass or all fail a bootstrap has no spread to see; there the interval is the exact binomial one over
clusters (Clopper and Pearson), with each topic counted once. A worst group where all fail gets its upper end likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def codes(labels: Sequence[str]) -> tuple[NDArray[np.int64], int]:
    """Labels as numbers 0 … k-1 in order of appearance, and k."""
    known = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([known[label] for label in labels], dtype=np.int64), len(known)


def _tables(outcomes: Array, clusters: Sequence[str], groups: Sequence[str]) -> tuple[Array, Array]:
    """Sums of outcomes and numbers of prompts, both [clusters, groups]."""
    (c, n_clusters), (g, n_groups) = codes(clusters), codes(groups)
    sums, counts = np.zeros((n_clusters, n_groups)), np.zeros((n_clusters, n_groups))
    np.add.at(sums, (c, g), outcomes)
    np.add.at(counts, (c, g), 1.0)
    return sums, counts


def _combine(sums: Array, counts: Array, over: Literal["mean", "min"]) -> Array:
    """Mean or minimum over groups (the last axis) of the groups' means; a group without prompts is left out."""
    rates = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return np.asarray(np.nanmean(rates, axis=-1) if over == "mean" else np.nanmin(rates, axis=-1))


def cluster_bootstrap(
    outcomes: Sequence[float],
    clusters: Sequence[str],
    groups: Sequence[str],
    *,
    over: Literal["mean", "min"] = "mean",
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """The mean (or minimum) over groups of the groups' means, with its percentile interval from resampled clusters.

    Args:
        outcomes: one number a prompt: 1 or 0 for passed or not, or a difference of two such.
        clusters: each prompt's topic.
        groups: each prompt's group.
        over: how groups are combined.
        seed: equal seeds and clusters give equal resamples, so that differences between models are paired.
        resamples: number of resamples.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    sums, counts = _tables(values, clusters, groups)
    value = float(_combine(sums.sum(0), counts.sum(0), over))
    n = len(sums)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    drawn = _combine(weights @ sums, weights @ counts, over)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def rate(
    passed: Sequence[bool],
    clusters: Sequence[str],
    groups: Sequence[str],
    *,
    over: Literal["mean", "min"] = "mean",
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """A pass rate (see `cluster_bootstrap`); the exact interval over clusters where all or none pass."""
    if all(passed) or not any(passed):
        return Interval(float(passed[0]), *_exact(passed[0], len(set(clusters))))
    outcomes = [float(p) for p in passed]
    result = cluster_bootstrap(outcomes, clusters, groups, over=over, seed=seed, resamples=resamples)
    if over == "min" and result.value == 0:
        failing = set(groups) - {group for group, ok in zip(groups, passed, strict=True) if ok}
        sizes = [len({c for c, g in zip(clusters, groups, strict=True) if g == group}) for group in failing]
        result = result._replace(high=max(result.high, min(_exact(False, n)[1] for n in sizes)))
    return result


def _exact(passed: bool, n: int) -> tuple[float, float]:
    """Clopper-Pearson interval where all or none of n clusters pass."""
    from scipy.stats import binomtest

    exact = binomtest(n if passed else 0, n).proportion_ci(LEVEL, method="exact")
    return float(exact.low), float(exact.high)


def paired_difference(
    passed: Sequence[bool],
    other: Sequence[bool],
    clusters: Sequence[str],
    groups: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """Difference of two pass rates on the same prompts, with the interval of the paired cluster bootstrap."""
    outcomes = [float(a) - float(b) for a, b in zip(passed, other, strict=True)]
    return cluster_bootstrap(outcomes, clusters, groups, seed=seed, resamples=resamples)


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p of McNemar's test, from the prompts that only one of two models passes (1 where there are none)."""
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
