"""Sums: their text, the slips of the solver, the rows, and their tokens."""

from collections import Counter
from random import Random

import pytest

from qstar_jax.data.reading import read_rows
from qstar_jax.errors import InputError
from qstar_jax.tasks.tiny_sums.rows import SPLITS, split_rows
from qstar_jax.tasks.tiny_sums.solver import Solution, chances, solve
from qstar_jax.tasks.tiny_sums.sums import Sum, read_answer, read_sum, true_reward
from qstar_jax.tasks.tiny_sums.tokenizer import make_tokenizer

SUM = Sum(27, (8, 3, 9, 4))


@pytest.fixture(scope="module")
def rows():
    return {split: split_rows(split, 0, 400) for split in SPLITS}


def steps_of(text):
    return text.split(";")[:-1]


def right(step):
    """What the left side of a step comes to."""
    value, _, operand, *_ = step.split()
    return int(value) + int(operand)


def test_a_solution_by_hand():
    assert SUM.prompt == "27 + 8 + 3 + 9 + 4 =" and read_sum(SUM.prompt) == SUM
    assert SUM.results == (35, 38, 47, 51)
    solution = Solution(SUM, (25, 28, 37, 41))
    assert solution.text == " 27 + 8 = 25 ; 25 + 3 = 28 ; 28 + 9 = 37 ; 37 + 4 = 41 ; # 41"
    assert solution.slips == [True, False, False, False] and solution.first_error == 0 and not solution.is_right
    [[start, end]] = solution.marks
    assert solution.text[start:end] == "25" and solution.text[:start] == " 27 + 8 = "
    assert Solution(SUM, SUM.results).first_error == -1 and Solution(SUM, SUM.results).marks == []
    repaired = Solution(SUM, (36, 39, 47, 51))  # too high by one, then too low
    assert repaired.is_right and repaired.slips == [True, False, True, False]


def test_slips_by_hand():
    assert chances(27, 8) == pytest.approx({35: 0.46, 25: 0.5, 36: 0.02, 34: 0.02})  # the carry is forgotten
    assert chances(25, 5) == pytest.approx({30: 0.46, 20: 0.5, 31: 0.02, 29: 0.02})
    assert chances(24, 5) == pytest.approx({29: 0.96, 30: 0.02, 28: 0.02})


def test_the_solver_slips_with_its_probabilities():
    rng, drawn = Random(0), Counter()
    for _ in range(4000):
        drawn[solve(SUM, rng).results[0]] += 1
    for result, chance in chances(27, 8).items():
        assert drawn[result] / 4000 == pytest.approx(chance, abs=0.04)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (" 27 + 8 = 35 ; # 51", 1.0),
        ("# 51 ", 1.0),
        (" # 51 ; # 41", 0.0),
        (" # 051", 1.0),
        (" 51", 0.0),
        ("", 0.0),
        (" # ", 0.0),
        (" # 51 ;", 0.0),
        (" # 5 1", 0.0),
        (f" # {'9' * 5000}", 0.0),
    ],
)
def test_only_the_answer_counts(response, reward):
    assert true_reward(SUM.prompt, response) == reward
    assert true_reward(f"{SUM.prompt} ", response) == reward
    assert true_reward("What is 27 + 8?", response) is None


def test_answers_of_solutions_are_read_back(rows):
    for row in rows["steps"]:
        results = [int(step.split("=")[1]) for step in steps_of(row["completion"])]
        assert read_answer(row["completion"]) == results[-1]
        assert true_reward(row["prompt"], row["completion"]) == row["label"]
        truth = [right(step) != result for step, result in zip(steps_of(row["completion"]), results, strict=True)]
        assert row["slips"] == truth
        assert row["first_error"] == (truth.index(True) if any(truth) else -1)
        assert row["label"] or any(truth)


def test_pairs_differ_in_their_outcome_and_mark_what_is_false(rows):
    for row in rows["train"] + rows["test"]:
        assert true_reward(row["prompt"], row["chosen"]) == 1 and true_reward(row["prompt"], row["rejected"]) == 0
        results = [(step, step.split("=")[1].strip()) for step in steps_of(row["rejected"])]
        false = [result for step, result in results if right(step) != int(result)]
        assert [row["rejected"][start:end] for start, end in row["wrong"]] == false != []


def test_half_of_all_carries_go_wrong_and_outcomes_are_mixed(rows):
    carried = slipped = 0
    for row in rows["steps"]:
        for step, slip in zip(steps_of(row["completion"]), row["slips"], strict=True):
            if right(step) // 10 != int(step.split()[0]) // 10:
                carried, slipped = carried + 1, slipped + slip
    assert slipped / carried == pytest.approx(0.54, abs=0.06)
    assert 0.2 < sum(row["label"] for row in rows["outcomes"]) / 400 < 0.4


def test_no_held_out_sum_is_trained_on(rows):
    held_out = {row["prompt"] for split in ("test", "steps") for row in rows[split]}
    trained = {row["prompt"] for split in ("train", "solutions", "outcomes") for row in rows[split]}
    assert held_out and not held_out & trained
    assert all(read_sum(prompt).prompt == prompt for prompt in held_out | trained)


def test_rows_are_functions_of_the_seed_and_of_the_split(rows):
    assert read_rows("builtin:tiny-sums?seed=3", "train", 5) == split_rows("train", 3, 9)[:5]
    assert split_rows("train", 3, 5) != split_rows("train", 4, 5) != split_rows("test", 4, 5)
    assert set(rows["solutions"][0]) == {"prompt", "completion"}
    assert set(rows["outcomes"][0]) == {"prompt", "completion", "label"}
    with pytest.raises(InputError, match="no split 'dev'; expected one of train, test, solutions, outcomes, steps"):
        read_rows("builtin:tiny-sums", "dev")


def test_a_token_is_a_digit_or_a_sign(rows):
    tokenizer = make_tokenizer()
    assert len(tokenizer) < 40
    lengths = {len(tokenizer(step.rstrip()).input_ids) for row in rows["steps"] for step in steps_of(row["completion"])}
    assert lengths == {7}  # so every number has two digits
    for row in rows["steps"]:
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids and len(ids) < 80
        assert ids == tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"]).input_ids
