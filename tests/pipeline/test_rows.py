"""Rows of preferences: what is read, and what is refused by name."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from qstar_jax.errors import InputError
from qstar_jax.pipeline.evaluator import reward_of
from qstar_jax.pipeline.rows import labelled, read_pairs
from qstar_jax.pipeline.sampling import TextRun, make_rows

NAMES = ("outline", "text")
GOOD, BAD = {"outline": "a", "text": "b"}, {"outline": "a", "text": "c"}
PAIR = {"prompt": "p", "chosen": GOOD, "rejected": BAD}


def read(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_pairs(str(file), NAMES)


def test_both_forms_of_rows(tmp_path):
    outputs = {"prompt": "p", "outputs": [BAD, GOOD]}
    rows = read(tmp_path, PAIR, {**outputs, "better": 1}, {**outputs, "better": None}, {**outputs, "better": 0})
    assert [row.runs for row in rows] == [(GOOD, BAD), (GOOD, BAD), (BAD, GOOD), (BAD, GOOD)]
    assert [row.row for row in labelled(rows, "x")] == [0, 1, 3]
    with pytest.raises(InputError, match="better is null in all 1 rows"):
        labelled(rows[2:3], "x")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not"),
        ("[1]", "not a JSON object"),
        ({"chosen": GOOD, "rejected": BAD}, r"no text in column 'prompt' \(found: 'chosen', 'rejected'\)"),
        ({**PAIR, "prompt": None}, "no text in column 'prompt'"),
        ({"prompt": "p", "chosen": GOOD}, "no preference"),
        ({**PAIR, "chosen": "text"}, "a run is 'text'; expected a text of each stage"),
        ({**PAIR, "rejected": {"text": "c"}}, r"no output of stage outline \(found: text\)"),
        ({**PAIR, "rejected": {**BAD, "image": "x"}}, "image is no stage"),
        ({**PAIR, "rejected": {**BAD, "text": 3}}, "stage text: found int"),
        ({**PAIR, "rejected": GOOD}, "both runs are equal"),
        ({"prompt": "p", "outputs": [GOOD]}, "expected a list of two runs"),
        ({"prompt": "p", "outputs": [GOOD, BAD], "better": "first"}, "found 'first'; expected 0, 1 or null"),
    ],
)
def test_wrong_rows_are_refused_by_number(tmp_path, row, message):
    with pytest.raises(InputError, match=f"row 2.*{message}"):
        read(tmp_path, PAIR, row)


def reward(prompt, text):
    return float(text)


def runs(*texts):
    return [TextRun({"outline": "o", "text": text}) for text in texts]


def test_labels_follow_the_true_reward_of_the_last_text():
    first, second = runs("1", "0", "2", "3"), runs("0", "1", "2", "3")
    rows, left_out = make_rows(["p"] * 4, first, second, reward=reward, label="best", seed=0)
    assert [(row["chosen"]["text"], row["rewards"]) for row in rows] == [("1", [1.0, 0.0])] * 2
    assert left_out == {"both runs are equal": 2}
    many = 4000
    rows, _ = make_rows(["p"] * many, runs("1") * many, runs("0") * many, reward=reward, label="bradley_terry", seed=0)
    share = np.mean([row["chosen"]["text"] == "1" for row in rows])
    assert share == pytest.approx(1 / (1 + np.exp(-1)), abs=5 * np.sqrt(0.2 / many))
    cut = [TextRun({"outline": "o", "text": "5"}, ("text",))]
    assert make_rows(["p"], cut, runs("1"), reward=reward, label="best", seed=0) == (
        [],
        {"a stage reached its max_new_tokens": 1},
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "does not know the prompt 'p'"), (float("nan"), "is nan; expected a finite"), (float("inf"), "is inf")],
)
def test_true_rewards_that_are_no_numbers_are_refused(value, message):
    task = SimpleNamespace(true_reward=lambda prompt, text: value)
    with pytest.raises(InputError, match=message):
        reward_of(SimpleNamespace(task=task, config=SimpleNamespace(task="t")), "p", "text")


def test_rows_for_people_are_read_back_once_they_are_labelled(tmp_path):
    rows, _ = make_rows(["p"], runs("1"), runs("0"), reward=None, label="none", seed=0)
    assert rows[0]["better"] is None and "rewards" not in rows[0]
    [row] = read(tmp_path, {**rows[0], "better": 1})
    assert row.runs[0]["text"] == "0" and row.labelled
