import numpy as np
import pytest
from scipy import stats

from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.selection import Selection, choose_sizes, compute_selection, separations
from qstar_jax.evaluation.votes import Candidates, accuracies


def questions_of(rng, count=60, responses=4, informed=2.0):
    """Responses of which the score `sum` knows something, and `noise` nothing."""
    found = []
    for _ in range(count):
        correct = rng.random(responses) < rng.random()
        answers = ["1" if right else str(rng.integers(2, 5)) for right in correct]
        scores = {"sum": informed * correct + rng.normal(size=responses), "noise": rng.normal(size=responses)}
        found.append(Candidates(correct, answers, scores))
    return found


def test_the_record_has_means_over_questions_and_paired_gains():
    questions = questions_of(np.random.default_rng(0))
    found = compute_selection(questions, model="m", reference="r", beta=0.1)
    values = accuracies(questions, [1, 2, 4])
    assert found.sizes == (1, 2, 4) and (found.questions, found.responses, found.left_out) == (60, 240, 0)
    for name, columns in values.items():
        assert [interval.mean for interval in found.methods[name]] == pytest.approx(columns.mean(0).tolist())
    for base, gains in found.gains.items():
        for name, gain in gains.items():
            assert gain.mean == pytest.approx((values[name] - values[base])[:, -1].mean())
    # A paired interval is narrower than the two means allow.
    gain, best, majority = (
        found.gains["majority"]["best by sum"],
        *(found.methods[name][-1] for name in ("best by sum", "majority")),
    )
    assert gain.low > best.low - majority.high and gain.high < best.high - majority.low
    assert found.finding().reproduced is True and "best by sum" in found.finding().measured
    assert Selection.from_json(found.to_json(), "x") == found


def test_a_score_that_knows_nothing_reproduces_nothing():
    questions = questions_of(np.random.default_rng(1), count=200, informed=0.0)
    found = compute_selection(questions)
    assert found.finding().reproduced is not True
    backwards = [Candidates(q.correct, q.answers, {"sum": -1.0 * q.correct}) for q in questions]
    assert compute_selection(backwards).finding().reproduced is False


def test_areas_are_those_of_mann_and_whitney_over_all_and_within_questions():
    questions = questions_of(np.random.default_rng(2))
    found = separations(questions)["sum"]
    scores, correct = (np.concatenate([getter(q) for q in questions]) for getter in (
        lambda q: q.scores["sum"], lambda q: q.correct
    ))  # fmt: skip
    u = stats.mannwhitneyu(scores[correct], scores[~correct]).statistic
    assert found.overall.mean == pytest.approx(u / correct.sum() / (~correct).sum())
    within = [
        stats.mannwhitneyu(q.scores["sum"][q.correct], q.scores["sum"][~q.correct]).statistic
        / q.correct.sum()
        / (~q.correct).sum()
        for q in questions
        if 0 < q.correct.sum() < len(q.correct)
    ]
    assert len(within) < len(questions) and found.by_question.mean == pytest.approx(np.mean(within))
    all_right = [Candidates(np.ones(2, bool), ["1", "1"], {"sum": np.zeros(2)})]
    assert separations(all_right)["sum"].overall is separations(all_right)["sum"].by_question is None


def test_sizes_are_powers_of_two_that_nine_questions_in_ten_have():
    def of(*counts):
        return [Candidates(np.ones(count, bool), ["1"] * count) for count in counts]

    assert choose_sizes(of(*[8] * 19, 3), None) == (1, 2, 4, 8)
    assert choose_sizes(of(*[8] * 15, *[3] * 5), None) == (1, 2)
    assert choose_sizes(of(6, 6), None) == (1, 2, 4) and choose_sizes(of(6, 2), [5, 3]) == (3, 5)
    found = compute_selection(of(*[8] * 19, 3))
    assert (found.questions, found.left_out, found.responses) == (19, 1, 152)
    for sizes in ([], [0, 1], [2, 2], [9]):
        with pytest.raises(InputError, match="expected different numbers from 1 to 8"):
            choose_sizes(of(8, 8), sizes)
    with pytest.raises(InputError, match="single response"):
        choose_sizes(of(1, 1), None)
