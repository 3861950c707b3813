"""Selection against brute force: every subset of N responses is looked at, and every tie is split by hand."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from qstar_jax.errors import InputError
from qstar_jax.evaluation.votes import (
    Candidates,
    accuracies,
    best_by,
    best_of_n,
    draw_subsets,
    oracle,
    vote,
    vote_by,
    vote_weights,
)


def _elected(correct, answers, weights, subset):
    totals = {}
    for i in subset:
        if answers[i] is not None:
            totals.setdefault(answers[i], []).append(i)
    if not totals:
        return 0.0
    weight = {answer: sum(float(weights[i]) for i in members) for answer, members in totals.items()}
    winners = [answer for answer in weight if weight[answer] >= max(weight.values()) - 1e-9]
    return float(np.mean([np.mean([correct[i] for i in totals[answer]]) for answer in winners]))


def _best(correct, scores, subset):
    top = max(scores[i] for i in subset)
    return float(np.mean([correct[i] for i in subset if scores[i] == top]))


def _question(rng, count, *, consistent=True, none=True):
    answers = [None if none and rng.random() < 0.2 else str(rng.integers(0, 4)) for _ in range(count)]
    correct = np.array([answer == "0" for answer in answers])
    if not consistent:
        correct = rng.random(count) < 0.5
    scores = {"sum": rng.normal(size=count), "min": rng.integers(-2, 2, count).astype(float)}  # ties in the second
    return Candidates(correct, answers, scores)


@pytest.mark.parametrize("weight", ["sigmoid", "softmax", "identity"])
@pytest.mark.parametrize("consistent", [True, False])
def test_accuracies_are_averages_over_all_subsets(weight, consistent):
    rng, count = np.random.default_rng(0), 7
    questions = [_question(rng, count, consistent=consistent) for _ in range(12)]
    sizes = list(range(1, count + 1))
    found = accuracies(questions, sizes, weight=weight)
    assert list(found) == [
        "chance",
        "majority",
        "best by sum",
        "best by min",
        "vote by sum",
        "vote by min",
        "oracle",
    ]
    for q, question in enumerate(questions):
        for m, n in enumerate(sizes):
            subsets = list(combinations(range(count), n))
            expected = {
                "chance": np.mean(question.correct),
                "oracle": np.mean([any(question.correct[i] for i in s) for s in subsets]),
            }
            votes = {"majority": np.ones(count)}
            for name, scores in question.scores.items():
                expected[best_by(name)] = np.mean([_best(question.correct, scores, s) for s in subsets])
                votes[vote_by(name)] = vote_weights(scores, weight)
            for name, weights in votes.items():
                expected[name] = np.mean([_elected(question.correct, question.answers, weights, s) for s in subsets])
            for name, value in expected.items():
                assert found[name][q, m] == pytest.approx(value, abs=1e-12), (name, n)


def test_random_subsets_estimate_the_average_over_all():
    rng = np.random.default_rng(1)
    questions = [_question(rng, 14) for _ in range(6)]
    exact = accuracies(questions, [5], limit=comb(14, 5))
    drawn = accuracies(questions, [5], limit=1500)
    for name, values in exact.items():
        # Four standard errors of a mean of 1,500 values between 0 and 1; closed forms do not depend on the limit.
        tolerance = 1e-12 if name.startswith(("best", "chance", "oracle")) else 4 * 0.5 / np.sqrt(1500)
        np.testing.assert_allclose(drawn[name], values, atol=tolerance)
    assert any((drawn[name] != values).any() for name, values in exact.items())


def test_subsets_are_all_of_them_or_random_ones_of_the_same_size():
    assert len(draw_subsets(6, 3)) == 20
    drawn = draw_subsets(40, 20, limit=300, seed=3)
    assert drawn.shape == (300, 40) and (drawn.sum(1) == 20).all()
    assert drawn.mean(0) == pytest.approx(0.5, abs=0.15) and len(np.unique(drawn, axis=0)) == 300
    assert (drawn != draw_subsets(40, 20, limit=300, seed=4)).any()


def test_one_response_is_chance_and_all_of_them_have_one_outcome():
    question = Candidates(np.array([True, False, False]), ["1", "2", "2"], {"sum": np.array([3.0, 2.0, 0.0])})
    found = accuracies([question], [1, 2, 3])
    for name in found:
        assert found[name][0, 0] == pytest.approx(1 / 3)
    assert {name: found[name][0, 2] for name in ("majority", "best by sum", "oracle")} == {
        "majority": 0.0,
        "best by sum": 1.0,
        "oracle": 1.0,
    }


def test_weights_decide_and_adding_a_constant_changes_some_of_them_only():
    scores = np.array([2.0, 0.0, 0.0])
    correct, answers, everyone = np.array([True, False, False]), ["1", "2", "2"], np.ones((1, 3), bool)

    def voted(weight, shift=0.0):
        return vote(correct, answers, vote_weights(scores + shift, weight), everyone)

    assert voted("softmax") == voted("softmax", 50.0) == 1.0  # e^2 > 2
    assert voted("sigmoid") == 0.0 and voted("sigmoid", -50.0) == 1.0  # 0.88 < 1; far below 0, sigma is exp
    assert voted("identity") == 1.0 and voted("identity", 3.0) == 0.0


def test_equal_weights_are_a_tie_however_they_are_added():
    weights = np.array([0.1, 0.2, 0.3, 0.3, 0.2, 0.1])
    assert vote(np.arange(6) < 3, [*"aaabbb"], weights, np.ones((1, 6), bool)) == 0.5


def test_questions_are_checked():
    good = Candidates(np.array([True, False]), ["1", None], {"sum": np.zeros(2)})
    assert vote(good.correct, [None, None], np.ones(2), np.ones((1, 2), bool)) == 0.0
    with pytest.raises(ValueError, match="one entry per response"):
        Candidates(np.array([True, False]), ["1"])
    with pytest.raises(InputError, match=r"score '.*' of response \d of a question is not finite \("):
        Candidates(np.array([True, False]), ["1", "2"], {"sum": np.array([0.0, np.nan])})
    with pytest.raises(ValueError, match="different scores"):
        accuracies([good, Candidates(good.correct, good.answers)], [1])
    for call in (lambda n: oracle(good.correct, n), lambda n: best_of_n(good.correct, np.zeros(2), n)):
        for n in (0, 3):
            with pytest.raises(ValueError, match="expected 1 to 2"):
                call(n)
