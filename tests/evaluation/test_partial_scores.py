"""Scores that an interrupted run has left, and a disk has damaged."""

import os
import signal
from types import SimpleNamespace

import pytest

from qstar_jax.evaluation.partial_scores import PARTIAL, PartialScores
from qstar_jax.evaluation.token_rewards import _kept
from qstar_jax.interruption import Stopped

IDENTITY = {"model": "one"}


@pytest.fixture
def kept(tmp_path, random_examples, respond):
    """Six examples of two responses, all of them scored; and the lines of the file."""
    examples = random_examples(6)
    with PartialScores(tmp_path, IDENTITY) as scores:
        for example in examples:
            scores.append([respond(["a", "b"], [0.5, 0.25], row=example.row) for _ in example.responses])
    return examples, (tmp_path / PARTIAL).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("number", "line", "taken", "says"),
    [
        (9, b"null\n", 4, "line 9 is not readable"),
        (6, b'{"row": 2}\n', 2, "line 6 is not readable"),
        (12, b"\xff\xfe\n", 4, "line 12 is not readable"),
        (1, b"[1]\n", 0, "line 1 is not readable"),
        (5, None, 4, None),
        (4, "the first", 0, "line 4 is of row 0, and row 1 was due"),
    ],
)
def test_scores_after_a_damaged_line_are_not_taken(number, line, taken, says, kept, tmp_path):
    examples, lines = kept
    if line is not None:
        lines[number - 1] = lines[0] if line == "the first" else line
    (tmp_path / PARTIAL).write_bytes(b"".join(lines))
    scores = PartialScores(tmp_path, IDENTITY)
    count, records = scores.take(examples, 2)
    if line is None:
        assert (count, scores.damage) == (6, None)
        return
    assert (count, len(records), scores.damage) == (taken, 2 * taken, says)
    with scores:
        pass
    assert (tmp_path / PARTIAL).read_bytes() == b"".join(lines[: 2 * taken])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_signal_during_the_last_batch_stops_nothing(batch, tmp_path, random_examples, respond):
    examples, records = random_examples(4), []
    batches = _kept(iter([1, 2]), records, SimpleNamespace(examples=examples), PartialScores(tmp_path, IDENTITY))

    def score_all():
        for number in batches:
            if number == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            records.extend(respond(["a"], [0.5]) for _ in range(4))

    if batch == 1:
        with pytest.raises(Stopped, match="stopped after 4 of 8 responses"):
            score_all()
    else:
        score_all()
        assert len((tmp_path / PARTIAL).read_bytes().splitlines()) == 8
