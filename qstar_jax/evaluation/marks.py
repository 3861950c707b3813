"""Finds the wrong tokens of a response from marks in a data file: ranges of characters, or texts that occur once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from qstar_jax.data.dialogues import text_of
from qstar_jax.data.records import Record
from qstar_jax.errors import InputError
from qstar_jax.evaluation.scored import ScoredResponse

UNMARKED = "all"  # kind of a mistake whose row names none
_EXPECTED = 'a list of [start, end) character ranges of the response, or of texts that occur in it once, as ["250K"]'


def read_marks(marks: Any, response: str, where: str) -> list[tuple[int, int]]:
    """Reads the marks of one response.

    Args:
        marks: A list; each entry is [start, end), in characters of the response, or a text that occurs in it once.
        response: The response as written in the file.
        where: File and row, for errors.

    Returns:
        Character ranges, at least one.

    Raises:
        InputError: If the marks have another form or lie outside the response.
    """
    if not isinstance(marks, list) or not marks:
        raise InputError(f"{where}: found {marks!r} as marks; expected {_EXPECTED}")
    return [_range(mark, response, where) for mark in marks]


def _range(mark: Any, response: str, where: str) -> tuple[int, int]:
    if isinstance(mark, str) and mark:
        if (times := response.count(mark)) != 1:
            raise InputError(
                f"{where}: the marked text {mark!r} occurs {times} times in the response; expected once: mark more of "
                "it, or give [start, end)"
            )
        start = response.index(mark)
        return start, start + len(mark)
    if isinstance(mark, list) and len(mark) == 2 and all(type(place) is int for place in mark):
        start, end = mark
        if 0 <= start < end <= len(response):
            return start, end
        raise InputError(f"{where}: the range {mark} lies outside the response's {len(response)} characters")
    raise InputError(f"{where}: found the mark {mark!r}; expected {_EXPECTED}")


def marked_tokens(
    pieces: Sequence[str], response: str, ranges: Sequence[tuple[int, int]], where: str
) -> list[Bool[np.ndarray, " T"]]:
    """Finds the tokens that cover marked characters, without the spaces before a word.

    Args:
        pieces: Text of each token; joined, they spell the response, perhaps with the end of a chat turn.
        response: The response as written in the file.
        ranges: Its marked characters.
        where: File and row, for errors.

    Returns:
        For each range, whether each token covers part of it.

    Raises:
        InputError: If the tokens do not spell the response, or a mark lies beyond their end or covers spaces only.
    """
    text = "".join(pieces)
    lead = len(response) - len(response.lstrip())  # chat templates strip responses
    last = max(end for _, end in ranges)
    offset = text.find(response[lead:last].rstrip()) - lead
    if offset < -lead:
        raise InputError(
            f"{where}: the tokens do not spell the response up to its last mark (they begin with {text[:40]!r}); a "
            "longer data.max_length may help"
        )
    ends = np.cumsum([len(piece) for piece in pieces])
    owner = np.searchsorted(ends, np.arange(len(text)), side="right")  # the token of each character
    covered = []
    for start, end in ranges:
        characters = [i + offset for i in range(start, end) if not response[i].isspace()]
        if not characters:
            raise InputError(f"{where}: the mark [{start}, {end}) covers no word; expected {_EXPECTED}")
        covered.append(np.isin(np.arange(len(pieces)), owner[characters]))
    return covered


@dataclass(frozen=True)
class MarkedResponse:
    """A response some of whose tokens are known to be wrong.

    Attributes:
        scored: The response and its rewards.
        spans: For each mistake, which actions it covers. Shape [T] each.
        kind: Kind of the mistakes.
        advantages: True advantage of each token, where the task knows it. Shape [T].
    """

    scored: ScoredResponse
    spans: tuple[Bool[np.ndarray, " T"], ...]
    kind: str
    advantages: Float[np.ndarray, " T"] | None = None

    @property
    def wrong(self) -> Bool[np.ndarray, " T"]:
        """Which actions are wrong."""
        return np.any(self.spans, axis=0)

    @property
    def right(self) -> Bool[np.ndarray, " T"]:
        """Which actions are not wrong."""
        return np.array(self.scored.action_mask) & ~self.wrong


def mark_responses(
    scored: Sequence[ScoredResponse],
    rows: Sequence[dict],
    records: Sequence[Record],
    *,
    wrong: str,
    kind: str,
    source: str,
) -> list[MarkedResponse]:
    """Joins scored responses and the marks of their rows.

    Args:
        scored: Responses; those with the role "chosen" are skipped.
        rows: All rows of the file.
        records: The records made of them; the last response of each is the marked one.
        wrong: Column of the marks, see `read_marks`.
        kind: Column that names the kind of mistake; rows without it are of the kind "all".
        source: The file, for errors.

    Returns:
        One marked response for each scored one.

    Raises:
        InputError: If a row has no such column, or marks that do not fit its response.
    """
    record_of_row = {record.row: record for record in records}
    marked = []
    for response in scored:
        if response.role == "chosen":
            continue
        row, record, where = rows[response.row], record_of_row[response.row], f"{source} row {response.row + 1}"
        if wrong not in row:
            raise InputError(
                f"{where}: no column {wrong!r} (found: {', '.join(map(repr, row))}); name the one that marks what is "
                "wrong with --wrong"
            )
        # In a dialogue of several turns, marks are texts of what the template renders.
        written = record.responses[-1]
        is_dialogue = isinstance(written, list) and len(written) > 1
        text = "".join(response.pieces) if is_dialogue else text_of(written)
        ranges = read_marks(row[wrong], text, where)
        if not all(isinstance(mark, str) for mark in row[wrong]) and (is_dialogue or record.repeats == "removed"):
            why = "the response has several turns" if is_dialogue else "a repeated prompt was removed from the response"
            fix = "" if is_dialogue else ", or set --data.repeated_prompt keep"
            raise InputError(f"{where}: marks are ranges of characters, but {why}; mark texts{fix}")
        actions = np.array(response.action_mask)
        spans = tuple(tokens & actions for tokens in marked_tokens(response.pieces, text, ranges, where))
        if not all(span.any() for span in spans):
            raise InputError(f"{where}: a mark covers no token of the assistant; mark what the assistant says")
        marked.append(MarkedResponse(response, spans, str(row.get(kind, UNMARKED))))
    return marked
