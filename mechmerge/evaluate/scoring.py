"""From verdicts to metrics: flat names, tiers, groups, and paired tests of headline metrics.

`SUITE` is the mean over groups of the share of passing answers, on prompts worded as in training; `SUITE.min` the worst group,
`SUITE.GROUP` one group; `…@unseen` the same on unseen wordings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mechmerge.evaluate.record import EvaluateSettings, Metric, PairTest
from mechmerge.evaluate.statistics import Interval, holm, mcnemar, paired_difference, rate
from mechmerge.evaluate.suites import Suite

MIN_GROUPS = 3
"""A suite of fewer groups shows no `min`: of two groups both are in the breakdown."""


class Verdicts(NamedTuple):
    """One model's verdicts in one suite, in the order of its prompts."""

    suite: Suite
    passed: list[bool]


class Slice(NamedTuple):
    """Prompts of one tier, as columns."""

    rows: list[int]
    clusters: list[str]
    groups: list[str]


def headline_names(suite: Suite) -> dict[str, Slice]:
    """Headline metrics of a suite (one a tier) with their prompts."""
    found: dict[str, Slice] = {}
    for tier, name in (("seen", suite.name), ("unseen", f"{suite.name}@unseen")):
        rows = [i for i, prompt in enumerate(suite.prompts) if prompt.tier == tier]
        if rows:
            # A prompt without a topic is a cluster of its own; the mark keeps its id from meeting a topic's name.
            clusters = [suite.prompts[i].topic or f"\0{suite.prompts[i].id}" for i in rows]
            found[name] = Slice(rows, clusters, [suite.prompts[i].group for i in rows])
    return found


def score(verdicts: Verdicts, settings: EvaluateSettings) -> dict[str, Metric]:
    """All metrics of one model in one suite by flat name; a tier's headline stands before its parts."""
    metrics: dict[str, Metric] = {}
    options: dict[str, Any] = {"seed": settings.seed, "resamples": settings.resamples}
    for name, part in headline_names(verdicts.suite).items():
        passed = [verdicts.passed[i] for i in part.rows]
        suite, at, tier = name.partition("@")
        metrics[name] = _metric(rate(passed, part.clusters, part.groups, **options), part.clusters)
        groups = list(dict.fromkeys(part.groups))
        if len(groups) >= MIN_GROUPS:
            worst = rate(passed, part.clusters, part.groups, over="min", **options)
            metrics[f"{suite}.min{at}{tier}"] = _metric(worst, part.clusters)
        for group in groups if len(groups) > 1 else []:
            mine = [i for i, other in enumerate(part.groups) if other == group]
            clusters = [part.clusters[i] for i in mine]
            one = rate([passed[i] for i in mine], clusters, [group] * len(mine), **options)
            metrics[f"{suite}.{group}{at}{tier}"] = _metric(one, clusters)
    return metrics


def _metric(interval: Interval, clusters: Sequence[str]) -> Metric:
    return Metric(value=interval.value, n=len(clusters), clusters=len(set(clusters)), low=interval.low, high=interval.high)


def pair_tests(
    pairs: Sequence[tuple[str, str]], verdicts: Mapping[str, Mapping[str, Verdicts]], settings: EvaluateSettings
) -> tuple[PairTest, ...]:
    """Paired tests of every headline metric for each (model, against); p-values corrected over all of them.

    Args:
        pairs: names of the models to compare.
        verdicts: by model and suite; all models answered the same suites.
        settings: seed and resamples.
    """
    tests: list[dict[str, Any]] = []
    for model, against in pairs:
        for suite_name, mine in verdicts[model].items():
            theirs = verdicts[against][suite_name]
            for metric, part in headline_names(mine.suite).items():
                a, b = [mine.passed[i] for i in part.rows], [theirs.passed[i] for i in part.rows]
                difference = paired_difference(
                    a, b, part.clusters, part.groups, seed=settings.seed, resamples=settings.resamples
                )
                better = sum(x and not y for x, y in zip(a, b, strict=True))
                worse = sum(y and not x for x, y in zip(a, b, strict=True))
                tests.append(
                    {
                        "model": model,
                        "against": against,
                        "metric": metric,
                        "difference": difference.value,
                        "low": difference.low,
                        "high": difference.high,
                        "better": better,
                        "worse": worse,
                        "p": mcnemar(better, worse),
                    }
                )
    corrected = holm([test["p"] for test in tests])
    return tuple(PairTest(**test, p_holm=p) for test, p in zip(tests, corrected, strict=True))
