import math

import pytest

from qstar_jax.evaluation.judges import Comparison, RewardJudge, Verdict
from qstar_jax.tasks.tiny_tldr import reward_of_text, split_rows


def lengths(pairs):
    return [float(len(answer)) for _, answer in pairs]


def test_the_larger_reward_wins_and_equal_ones_tie():
    judge = RewardJudge("length", lengths)
    found = judge([Comparison(0, "p", "long", "no"), Comparison(1, "p", "no", "long"), Comparison(2, "p", "ab", "cd")])
    assert found == [Verdict(1.0, 4.0, 2.0), Verdict(0.0, 2.0, 4.0), Verdict(0.5, 2.0, 2.0)]


def test_each_distinct_answer_is_scored_once():
    seen = []

    def reward(pairs):
        seen.extend(pairs)
        return lengths(pairs)

    RewardJudge("length", reward)([Comparison(i, "p", text, "base") for i, text in enumerate(["x", "xy", "x", "base"])])
    assert seen == [("p", "x"), ("p", "base"), ("p", "xy")]
    seen.clear()
    assert RewardJudge("length", reward)([]) == [] and seen == []


@pytest.mark.parametrize(
    ("rewards", "tolerance", "win"),
    [
        ((1.0, 1.0 + 5e-7), 1e-6, 0.5),
        ((1.0, 1.1), 1e-6, 0.0),
        ((1.0, 1.1), 0.2, 0.5),
        ((math.inf, math.inf), 0.0, 0.5),
        ((-math.inf, 0.0), 1.0, 0.0),
        ((math.nan, 0.0), 1.0, None),
        ((0.0, math.nan), 1.0, None),
        ((None, 0.0), 1.0, None),
    ],
)
def test_ties_and_rewards_that_are_no_numbers(rewards, tolerance, win):
    (found,) = RewardJudge("given", lambda pairs: rewards, tolerance)([Comparison(0, "p", "a", "b")])
    assert found.win == win
    if win is None:
        assert "no reward of the" in found.note and None in (found.answer_score, found.baseline_score)


def test_a_reward_that_is_not_one_a_pair_is_refused():
    with pytest.raises(ValueError, match="3 rewards for 2 responses"):
        RewardJudge("given", lambda pairs: [1, 2, 3])([Comparison(0, "p", "a", "b")])


def test_the_true_reward_of_the_task_judges_its_summaries():
    rows = split_rows("corrupted", limit=60)
    judge = RewardJudge("true", lambda pairs: [reward_of_text(*pair) for pair in pairs])
    found = judge([Comparison(i, row["prompt"], row["chosen"], row["rejected"]) for i, row in enumerate(rows)])
    assert [verdict.win for verdict in found] == [1.0] * len(rows)
