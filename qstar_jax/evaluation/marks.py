"""Finds the wrong tokens of a response from marks in a data file: ranges of characters, or texts that occur once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from qstar_jax.errors import InputError

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
