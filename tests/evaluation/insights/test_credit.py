from dataclasses import replace

import numpy as np
import pytest

from qstar_jax.data.records import Record
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.credit import (
    CEILING,
    REFERENCE,
    REWARD,
    UNIFORM,
    MarkedResponse,
    compute_credit,
    mark_responses,
)
from qstar_jax.evaluation.intervals import auc
from qstar_jax.evaluation.scored import ScoredResponse


def area(rewards, wrong):
    return auc(-rewards, wrong, np.zeros(len(wrong), int))(np.ones((1, 1)))[0]


def answer(rewards, ref_logp=None, row=0, role="rejected", pieces=None, action_mask=()):
    n = len(rewards)
    return ScoredResponse(
        row=row,
        role=role,
        prompt="p",
        pieces=tuple(pieces or "x" * n),
        token_ids=tuple(range(n)),
        logp=(0.0,) * n,
        ref_logp=tuple(ref_logp or (0.0,) * n),
        reward=tuple(rewards),
        q=(0.0,) * n,
        v=(0.0,) * n,
        truncated=False,
        beta=0.1,
        action_mask=action_mask,
    )


def marked(rng, kind="a", sharp=3.0, reference=0.0, advantages=True):
    wrong = np.zeros(8, bool)
    wrong[rng.integers(8)] = True
    rewards, ref_logp = rng.normal(size=8) - sharp * wrong, rng.normal(size=8) - reference * wrong
    advantages = -1.0 * wrong if advantages else None
    return MarkedResponse(answer(rewards.tolist(), ref_logp.tolist()), (wrong,), kind, advantages)


def report(count=80, **options):
    rng = np.random.default_rng(0)
    answers = [marked(rng, kind="ab"[i % 2], **options) for i in range(count)]
    return answers, compute_credit(answers, model="m", reference="r")


def test_areas_are_over_all_tokens_and_by_kind():
    answers, found = report()
    rewards = np.concatenate([a.scored.reward for a in answers])
    wrong = np.concatenate([a.wrong for a in answers])
    assert found.detectors[REWARD].mean == pytest.approx(area(rewards, wrong))
    assert found.detectors[CEILING].mean == 1.0
    assert abs(found.detectors[UNIFORM].mean - 0.5) < 0.05
    assert (found.answers, found.tokens, found.wrong_tokens) == (80, 640, 80)
    assert {name: kind.answers for name, kind in found.kinds.items()} == {"a": 40, "b": 40}
    own = [a for a in answers if a.kind == "a"]
    rewards, wrong = np.concatenate([a.scored.reward for a in own]), np.concatenate([a.wrong for a in own])
    expected = area(rewards, wrong)
    assert found.kinds["a"].detectors[REWARD].mean == pytest.approx(expected)


def spread(blamed, count=40):
    """Answers with a mistake of two tokens, one of which is blamed, and another mistake of one token."""
    first, second = np.isin(np.arange(6), [1, 2]), np.isin(np.arange(6), [4])
    rewards = [0.1 * i for i in range(6)]
    rewards[blamed] = rewards[4] = -1.0
    return compute_credit([MarkedResponse(answer(rewards), (first, second), "k")] * count, model="m", reference="r")


@pytest.mark.parametrize("blamed", [1, 2])
def test_a_mistake_of_several_tokens_is_found_by_its_lowest(blamed):
    found = spread(blamed)
    assert found.detectors[REWARD].mean == 1.0
    assert (found.mistakes, found.wrong_tokens) == (80, 120)
    assert 0.5 < found.by_token[REWARD].mean < 1.0  # its other token is not low


def test_blame_of_what_is_right_counts_against_it():
    assert spread(blamed=3).detectors[REWARD].mean < 0.9


def test_differences_are_paired():
    _, found = report(reference=3.0)
    difference, detectors = found.differences[REFERENCE], found.detectors
    assert difference.mean == pytest.approx(detectors[REWARD].mean - detectors[REFERENCE].mean)
    assert difference.low < 0 < difference.high
    assert set(found.differences) == {REFERENCE, UNIFORM}  # the ceiling is no control


def test_without_a_known_truth_there_is_no_ceiling():
    assert CEILING not in report(advantages=False)[1].detectors


@pytest.mark.parametrize(
    ("options", "reproduced"),
    [({"sharp": 4.0}, True), ({"sharp": 0.3}, False), ({"sharp": 4.0, "reference": 4.0}, None)],
)
def test_the_verdict_follows_the_numbers(options, reproduced):
    finding = report(**options)[1].finding()
    assert finding.reproduced is reproduced and "AUC" in finding.measured


ROWS = [{"rejected": "abc", "wrong": ["b"], "kind": "k"}, {"rejected": "abc", "wrong": [[2, 3]]}]
RECORDS = [Record("p", ("c", "abc"), row) for row in range(2)]
MARKS = {"wrong": "wrong", "kind": "kind", "source": "f"}


def test_marks_of_the_file_become_tokens():
    scored = [answer([1, 2, 3], row=r, role=role, pieces="abc") for r in (0, 1) for role in ("chosen", "rejected")]
    found = mark_responses(scored, ROWS, RECORDS, **MARKS)
    assert [(m.wrong.tolist(), m.kind) for m in found] == [([0, 1, 0], "k"), ([0, 0, 1], "all")]
    rows = [{"rejected": "abc", "wrong": ["a", "bc"]}]
    (found,) = mark_responses(scored[:2], rows, RECORDS, **MARKS)
    assert [span.tolist() for span in found.spans] == [[1, 0, 0], [0, 1, 1]]


def test_a_row_without_marks_is_an_error_that_names_the_option():
    scored = [answer([1, 2, 3], pieces="abc")]
    with pytest.raises(InputError, match=r"f row 1: no column 'spans' .*'rejected', 'wrong', 'kind'.*--wrong"):
        mark_responses(scored, ROWS, RECORDS, **MARKS | {"wrong": "spans"})


def test_marks_of_an_answer_whose_prompt_was_taken_off():
    scored = [answer([1, 2, 3], row=row, pieces="abc") for row in (0, 1)]
    rows = [row | {"rejected": "p: abc"} for row in ROWS]
    records = [replace(record, repeats="removed") for record in RECORDS]
    (found,) = mark_responses(scored[:1], rows, records, **MARKS)
    assert found.wrong.tolist() == [0, 1, 0]
    with pytest.raises(InputError, match=r"f row 2: marks are ranges.*mark texts, or set --data.repeated_prompt keep"):
        mark_responses(scored, rows, records, **MARKS)


def test_marks_of_a_dialogue_are_texts_of_the_assistant():
    scored = [answer([1, 0, 3], pieces="abc", action_mask=(True, False, True))]
    turns = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    records = [Record([{"role": "user", "content": "p"}], (turns, turns), 0)]
    (found,) = mark_responses(scored, [{"wrong": ["c"]}], records, **MARKS)
    assert found.wrong.tolist() == [0, 0, 1]
    for marks, message in (
        ([[0, 1]], "marks are ranges of characters, but the response has several turns; mark texts"),
        (["b"], "covers no token of the assistant"),
        (["d"], "occurs 0 times in the response"),
    ):
        with pytest.raises(InputError, match=message):
            mark_responses(scored, [{"wrong": marks}], records, **MARKS)
