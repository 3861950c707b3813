"""Steps of scored responses, and what the rows of a file say of them: where they end, and which are wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from qstar_jax.config import DataOptions
from qstar_jax.data.dialogues import text_of
from qstar_jax.data.outcomes import whole_number
from qstar_jax.data.records import Record
from qstar_jax.data.steps import find_steps, parse_delimiter
from qstar_jax.errors import InputError
from qstar_jax.evaluation.marks import marked_tokens, read_marks
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.steps import ALL_RIGHT

WRONG, RIGHT, UNKNOWN = 1, 0, -1
# Detectors of wrong steps
REWARD, VALUE, OUTCOME = "step reward", "value after the step", "outcome reward"
REFERENCE, ENTROPY = "lowest reference log-probability", "highest reference entropy"
ENDOGENOUS = "endogenous reward"
_EXPECTED = (
    "the number of the first wrong step, from 0, or -1 if all are right; or a list of numbers, or of marks, of what is "
    "wrong"
)


@dataclass(frozen=True)
class JudgedSteps:
    """The steps of a response some of which are known to be right or wrong.

    Attributes:
        scores: Detector -> score of each step, low where it suspects an error; infinity for a step without tokens.
            Shape [N] each.
        wrong: `WRONG`, `RIGHT` or `UNKNOWN` for each step. Shape [N].
        question: Which prompt it responds to, counted from 0.
    """

    scores: dict[str, Float[np.ndarray, " N"]]
    wrong: Int[np.ndarray, " N"]
    question: int

    @property
    def first_error(self) -> int:
        """The first wrong step; `ALL_RIGHT` if there is none."""
        return int(np.argmax(self.wrong == WRONG)) if (self.wrong == WRONG).any() else ALL_RIGHT


def with_steps(
    responses: Sequence[ScoredResponse],
    rows: Sequence[dict],
    options: DataOptions,
    special_ids: Sequence[int],
) -> list[ScoredResponse]:
    """Finds the steps of scored responses.

    Args:
        responses: Scored responses.
        rows: All rows of their file, of which a column may list the steps.
        options: `options.step_delimiter` says what ends a step.
        special_ids: Ids of the tokenizer's special tokens.

    Raises:
        InputError: If the delimiter cannot be used, or a list of steps does not spell its response.
    """
    delimiter, special = parse_delimiter(options.step_delimiter), frozenset(special_ids)
    found = []
    for response in responses:
        where, listed = _where(options.eval, response), None
        if delimiter.column is not None:
            _check_whole(response, where)
            listed = _column(rows[response.row], delimiter.column, where, "--data.step_delimiter column:NAME")
        turns = [turn if acts else -1 for turn, acts in zip(response.turn, response.action_mask, strict=True)]
        closing = {place for place, token in enumerate(response.token_ids) if token in special}
        step = find_steps(response.pieces, turns, delimiter, closing=closing, listed=listed, where=where)
        found.append(replace(response, step=step))
    return found


def judge_steps(
    responses: Sequence[ScoredResponse], rows: Sequence[dict], records: Sequence[Record], *, column: str, source: str
) -> list[JudgedSteps]:
    """Joins the steps of scored responses and what their rows say is wrong.

    Args:
        responses: Single responses with steps.
        rows: All rows of the file.
        records: The records made of them.
        column: Column that says which steps are wrong.
        source: The file, for errors.

    Raises:
        InputError: If a row does not say it, or says it of steps that are not there.
    """
    record_of_row = {record.row: record for record in records}
    questions: dict[str, int] = {}
    judged = []
    for response in responses:
        where = _where(source, response)
        _check_whole(response, where)
        value = _column(rows[response.row], column, where, "--wrong_step")
        wrong = _wrong_steps(value, response, record_of_row[response.row], f"{where}, column {column!r}")
        question = questions.setdefault(response.prompt, len(questions))
        judged.append(JudgedSteps(step_scores(response), wrong, question))
    return judged


def step_scores(response: ScoredResponse) -> dict[str, Float[np.ndarray, " N"]]:
    """Scores each step by every detector: three that read the trained policy step by step, and the controls.

    `REWARD`, `VALUE` and `ENDOGENOUS` are read from the policy. `OUTCOME` knows nothing of steps, `REFERENCE` and
    `ENTROPY` know nothing of preferences.

    Args:
        response: A response with steps, entropies, and the endogenous rewards of a response that has ended.

    Returns:
        Detector -> scores, low where it suspects an error. Shape [N] each.
    """
    step = np.array(response.step)
    places = [np.flatnonzero(step == number) for number in range(step.max() + 1)]
    reward, ref_logp = np.array(response.reward), np.array(response.ref_logp)
    entropy, endogenous = np.array(response.entropy), np.array(response.endogenous, float)
    so_far = np.cumsum(reward)

    def of_steps(score: Any) -> Float[np.ndarray, " N"]:
        return np.array([score(at) if len(at) else np.inf for at in places])

    return {
        REWARD: of_steps(lambda at: reward[at].sum()),
        VALUE: of_steps(lambda at: so_far[at[-1]]),
        OUTCOME: of_steps(lambda at: so_far[-1]),
        REFERENCE: of_steps(lambda at: ref_logp[at].min()),
        ENTROPY: of_steps(lambda at: -entropy[at].max()),
        ENDOGENOUS: of_steps(lambda at: endogenous[at].sum()),
    }


def after_first_error(first: int, count: int) -> Int[np.ndarray, " N"]:
    """Judges steps by the first wrong one: those after it go on from what is wrong, and no label speaks of them.

    Args:
        first: The first wrong step; `ALL_RIGHT` if there is none.
        count: How many steps there are.
    """
    wrong = np.full(count, RIGHT)
    if first != ALL_RIGHT:
        wrong[first], wrong[first + 1 :] = WRONG, UNKNOWN
    return wrong


def _wrong_steps(value: Any, response: ScoredResponse, record: Record, where: str) -> Int[np.ndarray, " N"]:
    count = max(response.step) + 1
    if (first := whole_number(value)) is not None and first >= ALL_RIGHT:
        return after_first_error(first if first == ALL_RIGHT else _step(first, count, where), count)
    if not isinstance(value, list):
        raise InputError(f"{where}: found {value!r}; expected {_EXPECTED}")
    wrong = np.full(count, RIGHT)
    for step in (entry for entry in value if type(entry) is int):
        wrong[_step(step, count, where)] = WRONG
    if marks := [entry for entry in value if type(entry) is not int]:
        written = record.responses[-1]
        if (isinstance(written, list) and len(written) > 1) or record.repeats == "removed":
            raise InputError(
                f"{where}: marks need a response of one turn, from which no prompt was removed; give numbers"
            )
        text = text_of(written)
        for tokens in marked_tokens(response.pieces, text, read_marks(marks, text, where), where):
            steps = np.array(response.step)[tokens]
            wrong[steps[steps >= 0]] = WRONG
    return wrong


def _step(number: int, count: int, where: str) -> int:
    if 0 <= number < count:
        return number
    raise InputError(
        f"{where}: found step {number} of a response of {count} steps, counted from 0; expected {_EXPECTED}, and a "
        "--data.step_delimiter that finds the same steps"
    )


def _column(row: dict, column: str, where: str, option: str) -> Any:
    if column not in row:
        raise InputError(f"{where}: no column {column!r} (found: {', '.join(map(repr, row))}); name it with {option}")
    return row[column]


def _check_whole(response: ScoredResponse, where: str):
    """Refuses what does not fit the steps that a row names."""
    if response.role != "answer":
        raise InputError(f"{where}: a column tells of the steps of one response; expected --answers single")
    if response.truncated:
        raise InputError(f"{where}: the response was truncated, and its last steps with it; raise --data.max_length")


def _where(source: str | None, response: ScoredResponse) -> str:
    return f"{source} row {response.row + 1}"
