"""How well detectors find first errors, on steps whose scores are made."""

import numpy as np
import pytest

from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.steps import StepErrors, compute_step_errors
from qstar_jax.evaluation.step_marks import REWARD, RIGHT, UNKNOWN, WRONG, JudgedSteps
from qstar_jax.evaluation.steps import ALL_RIGHT, first_error

NAMES = {"model": "policy", "reference": "base", "beta": 0.1}


def make(count, signal, seed=0, share=0.5):
    """Four responses to each prompt; wrong steps lower the step reward by `signal`, and no other detector's score."""
    rng, made = np.random.default_rng(seed), []
    for number in range(count):
        steps = int(rng.integers(2, 7))
        first = int(rng.integers(steps)) if rng.random() < share else ALL_RIGHT
        wrong = np.full(steps, RIGHT)
        if first != ALL_RIGHT:
            wrong[first], wrong[first + 1 :] = WRONG, UNKNOWN
        noise = rng.normal(size=(3, steps))
        scores = {REWARD: noise[0] - signal * (wrong == WRONG), "value after the step": noise[1], "noise": noise[2]}
        made.append(JudgedSteps(scores, wrong, number // 4))
    return made


def test_a_signal_is_found_and_noise_is_not():
    errors = compute_step_errors(make(400, 6.0), **NAMES)
    reward, noise = errors.detectors[REWARD], errors.detectors["noise"]
    assert reward.f1.low > 0.9 > noise.f1.high and reward.auc.low > 0.99
    assert noise.auc.low < 0.5 < noise.auc.high
    assert list(errors.gains) == ["noise"]  # the other view of the same rewards is no control
    gain = errors.gains["noise"]
    assert gain.f1.mean == pytest.approx(reward.f1.mean - noise.f1.mean) and gain.f1.low > 0
    assert errors.finding().reproduced is True
    assert compute_step_errors(make(400, -6.0), **NAMES).finding().reproduced is not True
    assert StepErrors.from_json(errors.to_json(), "x") == errors


def test_thresholds_come_from_the_calibration_split_alone():
    judged = make(200, 2.0)
    errors = compute_step_errors(judged, **NAMES, calibration=0.3, seed=5)
    assert (errors.calibration_questions, errors.questions, errors.responses) == (15, 35, 140)
    # What is measured may change as it likes: the threshold stays.
    calibrating = np.random.default_rng(5).permutation(50)[:15]
    changed = [
        j if j.question in calibrating else JudgedSteps({n: s + 9 for n, s in j.scores.items()}, j.wrong, j.question)
        for j in judged
    ]
    again = compute_step_errors(changed, **NAMES, calibration=0.3, seed=5)
    threshold = errors.detectors[REWARD].threshold
    assert again.detectors[REWARD].threshold == threshold and again.detectors[REWARD].f1 != errors.detectors[REWARD].f1
    # And F1 is that of the others at this threshold.
    measured = [j for j in judged if j.question not in calibrating]
    hits = [[], []]
    for j in measured:
        hits[j.first_error == ALL_RIGHT].append(first_error(j.scores[REWARD], threshold) == j.first_error)
    a, b = map(np.mean, hits)
    assert errors.detectors[REWARD].f1.mean == pytest.approx(2 * a * b / (a + b))
    assert errors.detectors[REWARD].erroneous.mean == pytest.approx(a)
    assert errors.erroneous == len(hits[0])


def test_a_given_threshold_is_that_of_the_step_reward():
    judged = make(200, 2.0)
    errors, given = (compute_step_errors(judged, **NAMES, threshold=threshold) for threshold in (None, -1e9))
    assert given.detectors[REWARD].threshold == -1e9 and given.given_threshold and not errors.given_threshold
    assert given.detectors[REWARD].correct.mean == 1.0 and given.detectors[REWARD].f1.mean == 0.0
    assert given.detectors["noise"] == errors.detectors["noise"]


def test_steps_that_are_not_judged_do_not_count():
    judged = make(100, 2.0)
    spoiled = [
        JudgedSteps({n: np.where(j.wrong == UNKNOWN, 1e3, s) for n, s in j.scores.items()}, j.wrong, j.question)
        for j in judged
    ]
    areas = [compute_step_errors(steps, **NAMES).detectors[REWARD].auc for steps in (judged, spoiled)]
    assert areas[0] == areas[1]


def test_both_splits_need_both_kinds():
    with pytest.raises(InputError, match=r"the calibration split has 0 responses with an error and .* without"):
        compute_step_errors(make(40, 1.0, share=0.0), **NAMES)
