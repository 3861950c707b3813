"""Which tokens of an answer are wrong, from marks in a data file: characters, or words that occur once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from qstar_jax.errors import InputError

_EXPECTED = 'a list of [start, end) character ranges of the answer, or of texts that occur in it once, such as ["250K"]'


def read_marks(marks: Any, answer: str, where: str) -> list[tuple[int, int]]:
    """Reads the marks of one answer.

    Args:
        marks: A list; each entry is [start, end), in characters of the answer, or a text that occurs in it once.
        answer: The answer as it stands in the file.
        where: File and row, for errors.

    Returns:
        Character ranges, at least one.

    Raises:
        InputError: If the marks have another form or do not lie in the answer.
    """
    if not isinstance(marks, list) or not marks:
        raise InputError(f"{where}: found {marks!r} as marks; expected {_EXPECTED}")
    return [_range(mark, answer, where) for mark in marks]


def _range(mark: Any, answer: str, where: str) -> tuple[int, int]:
    if isinstance(mark, str) and mark:
        if (times := answer.count(mark)) != 1:
            raise InputError(
                f"{where}: the marked text {mark!r} occurs {times} times in the answer; expected once: mark more of "
                "it, or give [start, end)"
            )
        start = answer.index(mark)
        return start, start + len(mark)
    if isinstance(mark, list) and len(mark) == 2 and all(type(place) is int for place in mark):
        start, end = mark
        if 0 <= start < end <= len(answer):
            return start, end
        raise InputError(f"{where}: the range {mark} does not lie in the answer's {len(answer)} characters")
    raise InputError(f"{where}: found the mark {mark!r}; expected {_EXPECTED}")


def marked_tokens(
    pieces: Sequence[str], answer: str, ranges: Sequence[tuple[int, int]], where: str
) -> list[Bool[np.ndarray, " T"]]:
    """Finds the tokens that cover marked characters, spaces before a word left aside.

    Args:
        pieces: Text of each token; joined, they spell the answer, perhaps with the end of a chat turn.
        answer: The answer as it stands in the file.
        ranges: Marked characters of it.
        where: File and row, for errors.

    Returns:
        For each range whether each token covers some of it.

    Raises:
        InputError: If the tokens do not spell the answer, or a mark lies behind their end or on spaces only.
    """
    text = "".join(pieces)
    lead = len(answer) - len(answer.lstrip())  # chat templates strip answers
    last = max(end for _, end in ranges)
    offset = text.find(answer[lead:last].rstrip()) - lead
    if offset < -lead:
        raise InputError(
            f"{where}: the tokens do not spell the answer up to its last mark (they begin with {text[:40]!r}); a "
            "longer data.max_length may help"
        )
    ends = np.cumsum([len(piece) for piece in pieces])
    owner = np.searchsorted(ends, np.arange(len(text)), side="right")  # the token of each character
    found = []
    for start, end in ranges:
        places = [place + offset for place in range(start, end) if not answer[place].isspace()]
        if not places:
            raise InputError(f"{where}: the mark [{start}, {end}) covers no word; expected {_EXPECTED}")
        found.append(np.isin(np.arange(len(pieces)), owner[places]))
    return found
