"""Questions with several responses each, as `qstar select` reads them: from a file, or from generations.jsonl."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qstar_jax.config import DataOptions
from qstar_jax.data.dialogues import text_of
from qstar_jax.data.dropped import BadRow
from qstar_jax.data.loading import read_records
from qstar_jax.data.outcomes import parse_label
from qstar_jax.data.records import Record
from qstar_jax.decoding.generations_file import DROPPED
from qstar_jax.errors import InputError
from qstar_jax.evaluation.final_answers import Extractor, final_answer, right_answer
from qstar_jax.evaluation.votes import Candidates

Place = tuple[int, int]  # row of the file, rank among its responses


@dataclass(frozen=True)
class Reply:
    """A response to a question, and what is known of it.

    Attributes:
        row: Row of the file.
        rank: Place among the responses to its row, from 0.
        text: Its text.
        answer: Its final answer, normalized; None: it gives none.
        correct: Whether it is right.
        labelled: What the file's label says; None without labels.
        scores: Name -> score.
    """

    row: int
    rank: int
    text: str
    answer: str | None
    correct: bool
    labelled: bool | None = None
    scores: Mapping[str, float] | None = None

    @property
    def place(self) -> Place:
        """Row and rank."""
        return self.row, self.rank

    def to_json(self) -> dict[str, Any]:
        """One line of responses.jsonl, without its question."""
        return {
            "row": self.row,
            "rank": self.rank,
            "answer": self.answer,
            "correct": self.correct,
            "scores": dict(self.scores or {}),
        }


Question = tuple[Reply, ...]  # the responses to one prompt


def read_questions(data: DataOptions, extract: Extractor, right: str | None) -> list[Question]:
    """Reads a file with one response per row; rows with the same prompt are one question.

    Args:
        data: `data.eval`, and its columns.
        extract: Finds final answers.
        right: Column of the right answer; None: `data.label` says which responses are right.

    Returns:
        The questions, in the order of their first rows.

    Raises:
        InputError: The file cannot be read, or does not say what is right.
    """
    rows, records, _ = read_records(data.eval, data.eval_split, "completions", data, data.max_eval_rows)
    # With both, the answers decide, and the labels are compared with them.
    labelled = right is None or any(isinstance(row, dict) and row.get(data.label) is not None for row in rows)
    replies: dict[str, list[Reply]] = {}
    for record in records:
        row = rows[record.row]
        text = text_of(record.responses[0])
        label = _label(row, record.row, data) if labelled else None
        answer = final_answer(text, extract)
        correct = label if right is None else answer == _right(row, record.row, data.eval, right, extract)
        replies.setdefault(_key(record), []).append(Reply(record.row, 0, text, answer, bool(correct), label))
    return [tuple(several) for several in replies.values()]


def read_generated(
    generations: Sequence[dict], data: DataOptions, extract: Extractor, right: str | None
) -> list[Question]:
    """Reads the responses of generations.jsonl, whose rows are those of `data.eval`, where the right answers are.

    Their own rewards and likelihoods, where they have them, become the scores `sum` and `log pi`.

    Raises:
        InputError: If there are no responses, some have scores that others have not, or the file does not say which
            answers are right.
    """
    if right is None:
        raise InputError("responses that were generated have no labels: name the column of the right answer (--right)")
    rows, _, _ = read_records(data.eval, data.eval_split, "prompts", data, data.max_eval_rows)
    replies: dict[str, list[Reply]] = {}
    for record in generations:
        number, text = record["row"], record["text"]
        if record["finish"] == DROPPED or not record["tokens"]:
            continue
        if number >= len(rows):
            raise InputError(f"the generations have a row {number + 1}, and {data.eval} only {len(rows)} rows")
        answer = final_answer(text, extract)
        correct = answer == _right(rows[number], number, data.eval, right, extract)
        scores = {"sum": record["reward"], "log pi": record["logp"]}
        scores = {name: float(value) for name, value in scores.items() if value is not None}
        reply = Reply(number, record["rank"], text, answer, correct, scores=scores)
        replies.setdefault(record["prompt"], []).append(reply)
    if not replies:
        raise InputError("the generations hold no response")
    questions = [tuple(several) for several in replies.values()]
    names = questions[0][0].scores.keys()
    for reply in (reply for question in questions for reply in question):
        if different := sorted(names ^ reply.scores.keys()):
            raise InputError(
                f"row {reply.row} of the generations: its response of rank {reply.rank} and the first response of all "
                f"do not both have the score {different[0]!r}; expected the same scores of all: generate them again"
            )
    return questions


def check_right(data: DataOptions, extract: Extractor, right: str):
    """Refuses prompts whose rows do not say the right answer, before responses to them are sampled.

    Raises:
        InputError: If there is one.
    """
    rows, records, _ = read_records(data.eval, data.eval_split, "prompts", data, data.max_eval_rows)
    for record in records:
        _right(rows[record.row], record.row, data.eval, right, extract)


def with_scores(questions: Sequence[Question], scores: Mapping[Place, Mapping[str, float]]) -> list[Question]:
    """Gives responses their scores; a response without scores is left out, and so is a question without responses."""
    scored = [
        tuple(replace(reply, scores=scores[reply.place]) for reply in question if reply.place in scores)
        for question in questions
    ]
    return [question for question in scored if question]


def candidates_of(question: Question) -> Candidates:
    """What selection reads of a question."""
    names = question[0].scores or {}
    return Candidates(
        correct=np.array([reply.correct for reply in question]),
        answers=[reply.answer for reply in question],
        scores={name: np.array([reply.scores[name] for reply in question]) for name in names},
    )


def _key(record: Record) -> str:
    return json.dumps([record.prompt, record.tools], sort_keys=True)


def _label(row: dict, number: int, data: DataOptions) -> bool:
    if data.label not in row:
        raise InputError(
            f"{data.eval} row {number + 1}: no column {data.label!r} (found: {', '.join(map(repr, row))}); name the "
            "column of the right answer with --right, or that of labels with --data.label"
        )
    try:
        return parse_label(row, data.label)
    except BadRow as error:
        raise InputError(f"{data.eval} row {number + 1}: {error.fault}") from error


def _right(row: Any, number: int, source: str, column: str, extract: Extractor) -> str:
    return right_answer(row, column, extract, where=f"{source} row {number + 1}", option="--right")
