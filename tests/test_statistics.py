"""Intervals and tests against known answers and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mechmerge.evaluate import resampling
from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.resampling import Layout
from mechmerge.evaluate.statistics import holm, interval, mcnemar, p_value, paired, retained


def one_group(n):
    return ["all"] * n


def column(values, clusters=None, groups=None, over="mean"):
    """Outcomes, each unit its own cluster unless told otherwise."""
    clusters = [str(i) for i in range(len(values))] if clusters is None else clusters
    return Column([float(v) for v in values], clusters, groups or one_group(len(values)), over)


def cluster_bootstrap(values, clusters, groups, over="mean", **options):
    return interval(column(values, clusters, groups, over), **options)


def paired_difference(a, b, clusters, groups):
    return paired(column(a, clusters, groups), column(b, clusters, groups))


rate = cluster_bootstrap


def test_many_single_prompt_clusters_agree_with_scipys_bootstrap():
    values = np.random.default_rng(1).random(600)
    mine = paired(column(values), column(np.zeros(600)), resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2))
    assert mine.value == pytest.approx(values.mean())
    # Newcombe's score interval may lie a little further out, never further in.
    assert theirs.confidence_interval.low - 0.005 < mine.low < theirs.confidence_interval.low + 0.001
    assert theirs.confidence_interval.high - 0.001 < mine.high < theirs.confidence_interval.high + 0.005


def test_independent_prompts_are_given_at_least_wilsons_interval():
    passed = [True] * 70 + [False] * 30
    mine = rate(passed, [str(i) for i in range(100)], one_group(100))
    wilson = stats.binomtest(70, 100).proportion_ci(method="wilson")
    assert mine.low <= wilson.low
    assert mine.high >= wilson.high
    assert mine.high - mine.low < 1.15 * (wilson.high - wilson.low)


def test_the_intervals_of_few_correlated_clusters_cover():
    """A plain percentile interval covers .84 to .91 here; at least .92 are asked for (400 draws, standard error .013)."""
    rng = np.random.default_rng(0)
    for rate_of_all, rho in ((0.1, 0.3), (0.5, 0.3), (0.9, 0.0)):
        covered = 0
        for seed in range(400):
            levels = np.full(12, rate_of_all)
            if rho:
                levels = rng.beta(rate_of_all * (1 - rho) / rho, (1 - rate_of_all) * (1 - rho) / rho, 12)
            passed = (rng.random((12, 3)) < levels[:, None]).ravel()
            found = rate(passed, [str(i // 3) for i in range(36)], one_group(36), seed=seed, resamples=300)
            covered += found.low <= rate_of_all <= found.high
        assert covered >= 0.92 * 400, (rate_of_all, rho)


def test_p_values_against_scipy_and_by_hand():
    a, b = [1] * 9 + [0] * 6, [0] * 8 + [1] + [0] * 5 + [1]
    p, test = p_value(column(a), column(b))
    assert (test, p) == ("mcnemar", pytest.approx(stats.binomtest(8, 9).pvalue))
    clusters = [str(i // 2) for i in range(8)]
    grouped = p_value(column([1, 1, 1, 1, 1, 1, 0, 0], clusters), column([0] * 8, clusters))
    assert grouped == (pytest.approx(2 / 2**3), "sign-flip"), "three clusters of one sign: 2 of 8 ways"
    values = np.random.default_rng(4).random(12)
    mine, test = p_value(column(values), column(np.full(12, 0.4)))
    theirs = stats.permutation_test((values, np.full(12, 0.4)), lambda x, y: np.mean(x - y), permutation_type="samples")
    assert (test, mine) == ("sign-flip", pytest.approx(theirs.pvalue, abs=1e-9))
    assert p_value(column([1, 0]), column([1, 0])) == (1.0, "mcnemar")
    many = [float(i % 3 == 0) / 2 for i in range(60)]
    drawn, _ = p_value(column(many), column([0.0] * 60))
    assert drawn == pytest.approx(1e-4), "20 clusters of one sign: no drawn flip reaches it"


def test_the_share_of_a_gain():
    base, expert, merged = ([1] * k + [0] * (100 - k) for k in (10, 90, 70))
    share = retained(column(merged), column(base), column(expert))
    assert share.value == pytest.approx(60 / 80)
    assert share.low < share.value < share.high
    assert retained(column(merged), column(base), column(base)) is None


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


@pytest.mark.parametrize("clusters", [30, 45])
def test_kept_resamples_are_those_that_would_be_drawn(clusters, monkeypatch):
    values = np.random.default_rng(3).random(90)
    layout = Layout(column(values, [str(i // 3) for i in range(90)]))
    kept = layout.bootstrap(values, 5, 50, clusters)
    weights = np.random.default_rng(5).multinomial(clusters, np.full(30, 1 / 30), size=50)
    assert kept == pytest.approx(weights @ values.reshape(30, 3).sum(1) / (3 * clusters))
    assert (layout.bootstrap(values, 5, 50, clusters) == kept).all()
    monkeypatch.setattr(resampling, "KEPT", 0)
    assert (layout.bootstrap(values, 5, 50, clusters) == kept).all(), "without keeping them"


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
    assert result.high == pytest.approx(1 - 0.0125 ** (1 / 24)), "Bonferroni's: the worst is picked of two groups"


def test_paired_differences_are_narrower_than_unpaired_ones():
    rng = np.random.default_rng(3)
    base = rng.random(100) < 0.5
    better = base | (rng.random(100) < 0.1)
    clusters = [str(i) for i in range(100)]
    difference = paired_difference(better.tolist(), base.tolist(), clusters, one_group(100))
    assert difference.value == pytest.approx(better.mean() - base.mean())
    alone = rate(better.tolist(), clusters, one_group(100))
    assert difference.value > 0
    wilson = stats.binomtest(3, 100).proportion_ci(method="wilson")
    assert difference.low > -0.02, "three wins and no loss: a percentile interval starts at 0 and accepts too often"
    assert difference.high == pytest.approx(wilson.high, abs=0.01)
    assert difference.high - difference.low < (alone.high - alone.low) / 2
    same = paired_difference(base.tolist(), base.tolist(), clusters, one_group(100))
    assert same == (0, pytest.approx(-0.0362, abs=1e-4), pytest.approx(0.0362, abs=1e-4)), "0 of 100 says at most 3.6 %"


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
