import tracemalloc

import numpy as np
import pytest
from scipy import stats

from qstar_jax.evaluation import intervals
from qstar_jax.evaluation.intervals import auc, bootstrap, correlation, mean_interval, rank_correlation


def test_area_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 300).astype(float), rng.random(300) < 0.2  # many ties
    u = stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    for owner in (np.arange(300), rng.integers(0, 7, 300), np.zeros(300, int)):  # whose they are makes no difference
        area = auc(scores, positive, owner)(np.ones((1, owner.max() + 1)))
        assert area == pytest.approx([u / positive.sum() / (~positive).sum()])


def test_weights_count_as_copies():
    rng = np.random.default_rng(1)
    scores, positive, owner = rng.normal(size=40), rng.random(40) < 0.5, np.repeat(np.arange(10), 4)
    weights = rng.integers(0, 4, (5, 10))
    for drawn, found in zip(weights, auc(scores, positive, owner)(weights), strict=True):
        copies = np.repeat(np.arange(40), drawn[owner])
        u = stats.mannwhitneyu(scores[copies][positive[copies]], scores[copies][~positive[copies]]).statistic
        assert found == pytest.approx(u / positive[copies].sum() / (~positive[copies]).sum())


def test_an_area_without_positives_or_negatives_is_not_a_number():
    assert np.isnan(auc(np.arange(3.0), np.zeros(3, bool), np.arange(3))(np.ones((1, 3)))).all()


def test_memory_grows_with_the_prompts_and_not_with_their_square(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 50)
    rng, count = np.random.default_rng(6), 100_000
    scores, positive = rng.normal(size=count), rng.random(count) < 0.3
    tracemalloc.start()
    interval = bootstrap(auc(scores, positive, np.arange(count)), count)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6 and interval.low < 0.5 < interval.high  # bytes; each float per pair of prompts would be 80e9


def test_resamples_are_the_same_in_blocks_of_any_size(monkeypatch):
    def total(weights):
        return weights @ np.arange(37) ** 2

    whole = bootstrap(total, 37)
    monkeypatch.setattr(intervals, "_BLOCK", 37 * 7)
    assert bootstrap(total, 37) == whole


def test_interval_of_a_mean_is_that_of_scipys_bootstrap():
    values = np.random.default_rng(2).exponential(size=150)
    found = mean_interval(values)
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=3).confidence_interval
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(other.low, abs=0.02) and found.high == pytest.approx(other.high, abs=0.02)


def test_values_that_are_missing_are_left_aside():
    found = mean_interval(np.array([1.0, np.nan, 3.0, np.nan]))
    assert found.mean == 2.0 and 1.0 <= found.low <= found.high <= 3.0


def test_the_seed_changes_the_resamples_only():
    values = np.random.default_rng(3).normal(size=30)
    one, same, other = mean_interval(values, seed=0), mean_interval(values, seed=0), mean_interval(values, seed=1)
    assert one == same and one.mean == other.mean and one.low != other.low


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(4)
    found = [mean_interval(rng.normal(size=60), seed=seed) for seed in range(200)]
    assert 0.88 <= np.mean([interval.low <= 0 <= interval.high for interval in found]) <= 0.99


@pytest.mark.parametrize(("ours", "scipys"), [(correlation, stats.pearsonr), (rank_correlation, stats.spearmanr)])
def test_correlations_are_those_of_scipy(ours, scipys):
    rng = np.random.default_rng(4)
    one = rng.integers(0, 9, 200).astype(float)  # many ties
    other, owner = one**2 + 20 * rng.normal(size=200), rng.integers(0, 30, 200)
    statistic = ours(one, other, owner)
    assert statistic(np.ones((1, 30))) == pytest.approx([scipys(one, other).statistic])
    if ours is correlation:  # weights count as copies; ranks are those among all items
        weights = rng.integers(0, 3, (4, 30))
        for drawn, found in zip(weights, statistic(weights), strict=True):
            copies = np.repeat(np.arange(200), drawn[owner])
            assert found == pytest.approx(scipys(one[copies], other[copies]).statistic)


def test_values_that_do_not_vary_have_no_correlation():
    assert np.isnan(correlation(np.ones(3), np.arange(3.0), np.arange(3))(np.ones((1, 3)))).all()
