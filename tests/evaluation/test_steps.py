"""First errors by the protocol of ProcessBench, against brute force."""

import numpy as np
import pytest

from qstar_jax.evaluation.intervals import bootstrap
from qstar_jax.evaluation.steps import (
    ALL_RIGHT,
    StepTotals,
    calibrate_threshold,
    first_error,
    first_error_accuracy,
    harmonic_mean,
    step_totals,
)


def test_totals_by_hand():
    assert step_totals([0.5, -1.0, 2.0]) == StepTotals(sum=1.5, min=-1.0, mean=0.5, last=2.0)


def test_the_first_step_below_the_threshold_is_suspected():
    scores = [0.2, -0.1, -0.5]
    assert [first_error(scores, threshold) for threshold in (0.3, 0.2, 0.0, -0.1, -0.5)] == [0, 1, 1, 2, ALL_RIGHT]


def responses(rng, count=60):
    """Scores with ties, infinities among them, and true first errors."""
    scores = [rng.integers(-4, 5, rng.integers(1, 7)).astype(float) for _ in range(count)]
    truth = np.array([rng.integers(-1, len(s)) for s in scores])
    scores[0][0] = np.inf  # a step without tokens
    return scores, truth


def f1_of(scores, truth, threshold):
    """F1 in plain words."""
    hits = {True: [], False: []}
    for s, t in zip(scores, truth, strict=True):
        below = [step for step, score in enumerate(s) if score < threshold]
        hits[t != -1].append((below[0] if below else -1) == t)
    a, b = np.mean(hits[True]), np.mean(hits[False])
    return 2 * a * b / (a + b) if a + b else 0.0


@pytest.mark.parametrize("seed", range(20))
def test_the_calibrated_threshold_is_the_best_of_all(seed):
    scores, truth = responses(np.random.default_rng(seed))
    threshold = calibrate_threshold(scores, truth)
    scanned = max(f1_of(scores, truth, candidate) for candidate in np.arange(-6, 7, 0.25))
    assert f1_of(scores, truth, threshold) == pytest.approx(scanned) and np.isfinite(threshold)


def test_a_threshold_separates_with_the_widest_margin():
    scores, truth = [np.array([3.0, -2.0]), np.array([1.0, 2.0])], [1, ALL_RIGHT]
    assert calibrate_threshold(scores, truth) == -0.5


@pytest.mark.parametrize("truth", [[0, 1], [ALL_RIGHT, ALL_RIGHT]])
def test_calibration_needs_responses_of_both_kinds(truth):
    with pytest.raises(ValueError, match="expected some with and some without"):
        calibrate_threshold([np.zeros(2)] * 2, truth)


def test_f1_is_that_of_plain_words_in_every_resample():
    rng = np.random.default_rng(3)
    scores, truth = responses(rng)
    owner = np.repeat(np.arange(15), 4)
    predicted = [first_error(s, 0.0) for s in scores]
    erroneous, correct, f1 = first_error_accuracy(predicted, truth, owner)
    weights = rng.multinomial(15, np.ones(15) / 15, 8)
    for drawn, a, b, f in zip(weights, erroneous(weights), correct(weights), f1(weights), strict=True):
        copies = np.repeat(np.arange(60), drawn[owner])
        assert f == pytest.approx(f1_of([scores[i] for i in copies], truth[copies], 0.0))
        assert f == pytest.approx(harmonic_mean(np.array([a]), np.array([b]))[0])
    interval = bootstrap(f1, 15)
    assert interval.mean == pytest.approx(f1_of(scores, truth, 0.0)) and interval.low < interval.mean < interval.high


def test_accuracy_without_such_responses_is_not_a_number():
    erroneous, correct, f1 = first_error_accuracy([0, 1], [0, 0], np.arange(2))
    one = np.ones((1, 2))
    assert erroneous(one) == 0.5 and np.isnan(correct(one)) and np.isnan(f1(one))


def test_never_suspecting_scores_nothing():
    _, truth = responses(np.random.default_rng(5))
    _, correct, f1 = first_error_accuracy([ALL_RIGHT] * 60, truth, np.arange(60))
    one = np.ones((1, 60))
    assert correct(one) == 1.0 and f1(one) == 0.0
