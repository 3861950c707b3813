"""Steps of scored responses, and what rows say of them."""

from dataclasses import replace

import numpy as np
import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.records import Record
from qstar_jax.errors import InputError
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.step_marks import REWARD, RIGHT, UNKNOWN, WRONG, judge_steps, step_scores, with_steps
from qstar_jax.evaluation.steps import ALL_RIGHT

PIECES = ["One", " two;", " three", ";", " four", "<eos>"]
TEXT = "One two; three; four"


def find(responses, rows=None, delimiter=";"):
    options = DataOptions(eval="rows.jsonl", step_delimiter=delimiter)
    return with_steps(responses, rows or [{}], options, [105])


@pytest.fixture
def response(respond):
    made = respond(PIECES, [0.5, -1.0, 0.25, 0.25, -0.125, 0.5])
    return replace(made, entropy=(0.1, 2.0, 0.3, 0.1, 0.0, 0.5), endogenous=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))


def judge(response, value):
    records = [Record("Say it.", (TEXT,), 0)]
    (judged,) = judge_steps([response], [{"wrong": value}], records, column="wrong", source="rows.jsonl")
    return judged


def test_steps_are_those_of_the_delimiter_and_survive_json(response):
    (found,) = find([response])
    assert found.step == (0, 0, 1, 1, 2, 2)  # EOS is the last token of the last step
    assert [(s.step, s.text, s.actions, s.reward, s.value) for s in found.steps] == [
        (0, "One two;", 2, -0.5, -0.5),
        (1, " three;", 2, 0.5, 0.0),
        (2, " four<eos>", 2, 0.375, 0.375),
    ]
    assert found.step_totals.sum == found.total_reward == 0.375 and found.step_totals.min == -0.5
    assert ScoredResponse.from_json(found.to_json()) == found
    assert response.steps == () and response.step_totals is None and response.to_json()["steps"] is None
    (listed,) = find([response], [{"parts": ["One two;", "three; four"]}], "column:parts")
    assert listed.step == (0, 0, 1, 1, 1, 1)


def test_detectors_by_hand(response):
    (found,) = find([response])
    scores = step_scores(found)
    expected = {
        REWARD: [-0.5, 0.5, 0.375],
        "value after the step": [-0.5, 0.0, 0.375],
        "outcome reward": [0.375] * 3,
        "lowest reference log-probability": [found.ref_logp[1], found.ref_logp[3], found.ref_logp[5]],
        "highest reference entropy": [-2.0, -0.3, -0.5],
        "endogenous reward": [3.0, 7.0, 11.0],
    }
    assert list(scores) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values)
    skipped = step_scores(replace(found, step=(0, 0, 2, 2, 2, 2)))  # a step without tokens
    assert all(values[1] == np.inf for values in skipped.values())


@pytest.mark.parametrize(
    ("value", "wrong", "first"),
    [
        (-1, [RIGHT, RIGHT, RIGHT], ALL_RIGHT),
        (0, [WRONG, UNKNOWN, UNKNOWN], 0),
        (1, [RIGHT, WRONG, UNKNOWN], 1),
        ("1", [RIGHT, WRONG, UNKNOWN], 1),  # as CSV files hold it
        (1.0, [RIGHT, WRONG, UNKNOWN], 1),  # as a column with gaps holds it
        ([], [RIGHT, RIGHT, RIGHT], ALL_RIGHT),
        ([1, 2], [RIGHT, WRONG, WRONG], 1),
        (["three"], [RIGHT, WRONG, RIGHT], 1),
        ([[4, 7], "four"], [WRONG, RIGHT, WRONG], 0),
        ([[4, 14]], [WRONG, WRONG, RIGHT], 0),
    ],
)
def test_what_is_wrong(value, wrong, first, response):
    judged = judge(find([response])[0], value)
    assert judged.wrong.tolist() == wrong and judged.first_error == first


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "found None; expected the number of the first wrong step"),
        (True, "found True"),
        (-2, "found -2"),
        ("first", "found 'first'"),
        (float("nan"), "found nan"),
        (float("inf"), "found inf"),
        (10**400, "found 1000"),
        (0.5, "found 0.5"),
        ("3", "found step 3 of a response of 3 steps"),
        (3, "found step 3 of a response of 3 steps"),
        ([-1], "found step -1"),
        (["five"], "occurs 0 times"),
    ],
)
def test_what_cannot_be_read_is_refused(value, message, response):
    with pytest.raises(InputError, match=f"rows.jsonl row 1.*{message}"):
        judge(find([response])[0], value)


def test_truncated_responses_pairs_and_missing_columns_are_refused(response):
    for changed, message in (({"truncated": True}, "truncated"), ({"role": "rejected"}, "--answers single")):
        with pytest.raises(InputError, match=message):
            judge(replace(find([response])[0], **changed), 0)
        with pytest.raises(InputError, match=message):
            find([replace(response, **changed)], [{"parts": [TEXT]}], "column:parts")
    with pytest.raises(InputError, match=r"no column 'parts' .*found: 'steps'.*column:NAME"):
        find([response], [{"steps": [TEXT]}], "column:parts")
    with pytest.raises(InputError, match=r"no column 'label' .*name it with --wrong_step"):
        judge_steps(find([response]), [{"x": 1}], [Record("p", (TEXT,), 0)], column="label", source="rows.jsonl")


def test_responses_to_one_prompt_are_one_question(response):
    responses = [replace(r, row=row) for row, r in enumerate(find([response] * 3))]
    responses[1] = replace(responses[1], prompt="Another.")
    records = [Record("p", (TEXT,), row) for row in range(3)]
    judged = judge_steps(responses, [{"wrong": 0}] * 3, records, column="wrong", source="rows.jsonl")
    assert [j.question for j in judged] == [0, 1, 0]
