"""Intervals and tests against known answers and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mechmerge.evaluate.statistics import cluster_bootstrap, codes, holm, mcnemar, paired_difference, rate


def one_group(n):
    return ["all"] * n


def test_codes_number_labels_in_order_of_appearance():
    numbers, n = codes(["b", "a", "b"])
    assert (numbers.tolist(), n) == ([0, 1, 0], 2)


def test_single_prompt_clusters_agree_with_scipys_bootstrap():
    values = np.random.default_rng(1).random(60)
    mine = cluster_bootstrap(values.tolist(), [str(i) for i in range(60)], one_group(60), resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2))
    assert mine.value == pytest.approx(values.mean())
    assert mine.low == pytest.approx(theirs.confidence_interval.low, abs=0.005)
    assert mine.high == pytest.approx(theirs.confidence_interval.high, abs=0.005)


def test_clusters_are_resampled_whole():
    """Ten topics of ten equal answers know no more than ten answers."""
    answers = [float(topic % 2) for topic in range(10) for _ in range(10)]
    whole = cluster_bootstrap(answers, [str(i // 10) for i in range(100)], one_group(100))
    ten = cluster_bootstrap(answers[::10], [str(i) for i in range(10)], one_group(10))
    independent = cluster_bootstrap(answers, [str(i) for i in range(100)], one_group(100))
    assert whole == pytest.approx(ten)
    assert whole.high - whole.low > 2 * (independent.high - independent.low)


def test_groups_count_alike_whatever_their_size():
    outcomes, groups = [1.0] * 9 + [0.0], ["a"] * 9 + ["b"]
    clusters = [str(i) for i in range(10)]
    assert cluster_bootstrap(outcomes, clusters, groups).value == 0.5
    assert cluster_bootstrap(outcomes, clusters, groups, over="min").value == 0.0


def test_equal_seeds_give_equal_intervals():
    outcomes, clusters = [1.0, 0.0, 1.0, 1.0, 0.0], list("abcde")
    one, same, other = (cluster_bootstrap(outcomes * 9, clusters * 9, one_group(45), seed=s, resamples=333) for s in (3, 3, 4))
    assert one == same
    assert one.value == other.value


def test_the_mean_covers_what_it_says():
    """About 95 % of intervals hold the true rate."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        passed = rng.random(80) < 0.4
        result = rate(passed.tolist(), [str(i) for i in range(80)], one_group(80), seed=seed, resamples=400)
        covered += result.low <= 0.4 <= result.high
    assert 180 <= covered <= 199


@pytest.mark.parametrize(("passed", "low", "high"), [(True, 0.8575, 1.0), (False, 0.0, 0.1425)])
def test_where_all_answers_agree_the_interval_is_exact(passed, low, high):
    """Clopper-Pearson for 24 of 24 and 0 of 24 (topics, not prompts)."""
    result = rate([passed] * 48, [str(i % 24) for i in range(48)], one_group(48))
    assert result.value == float(passed)
    assert (result.low, result.high) == pytest.approx((low, high), abs=1e-4)


def test_a_worst_group_where_all_fail_is_not_certain():
    passed = [False] * 24 + [True] * 24
    clusters, groups = [str(i % 24) for i in range(48)], ["a"] * 24 + ["b"] * 24
    result = rate(passed, clusters, groups, over="min")
    assert (result.value, result.low) == (0.0, 0.0)
    assert result.high == pytest.approx(0.1425, abs=1e-4)


def test_paired_differences_are_narrower_than_unpaired_ones():
    rng = np.random.default_rng(3)
    base = rng.random(100) < 0.5
    better = base | (rng.random(100) < 0.1)
    clusters = [str(i) for i in range(100)]
    difference = paired_difference(better.tolist(), base.tolist(), clusters, one_group(100))
    assert difference.value == pytest.approx(better.mean() - base.mean())
    alone = rate(better.tolist(), clusters, one_group(100))
    assert difference.value > 0
    assert difference.low >= 0
    assert difference.high - difference.low < (alone.high - alone.low) / 2
    assert paired_difference(base.tolist(), base.tolist(), clusters, one_group(100)) == (0, 0, 0)


def test_the_difference_of_swapped_models_is_mirrored():
    a, b = [True, True, False, True] * 5, [False, True, False, False] * 5
    clusters, groups = [str(i % 7) for i in range(20)], [str(i % 2) for i in range(20)]
    one, other = paired_difference(a, b, clusters, groups), paired_difference(b, a, clusters, groups)
    assert one.value == -other.value
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (5, 5, 1.0), (8, 0, 2 / 2**8), (9, 1, 22 / 2**10), (1, 9, 22 / 2**10)]
)
def test_mcnemar(better, worse, p):
    assert mcnemar(better, worse) == pytest.approx(p)


def test_holm_known_answer():
    """Holm's corrected values, by hand: .005 × 4, .01 × 3, then .03 × 2, which .04 × 1 may not undercut."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_lies_between_no_correction_and_bonferronis(p_values):
    corrected = holm(p_values)
    for p, q in zip(p_values, corrected, strict=True):
        assert p <= q <= min(1.0, p * len(p_values)) + 1e-12
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [corrected[i] for i in order] == sorted(corrected)
