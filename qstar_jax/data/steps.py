r"""Steps of a response: where its text ends each of them, and which tokens belong to which.

`data.step_delimiter` says what ends a step:

- a text, in which \n, \t and \\ stand for a line break, a tab and a backslash: `;`, `\n\n`;
- `re:` and a regular expression: `re:\n(?=Step \d)` ends a step before the next heading;
- `column:` and the name of a column that lists the texts of the steps, in order.

A step ends with its delimiter, and a token that straddles the end belongs to the earlier step; the space with which the
token of a word begins does not count. A step holds more than spaces and delimiters: what is empty joins the step before
it, or, at the beginning, the one after it. A turn of a dialogue ends a step too.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from qstar_jax.data.patterns import Pattern
from qstar_jax.errors import InputError

REGULAR, COLUMN = "re:", "column:"
NO_STEP = -1
_ESCAPE = re.compile(r"\\([nt\\])")
_ESCAPED = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class StepDelimiter:
    """What ends a step.

    Attributes:
        pattern: Matches the text of a delimiter; None where a column lists the steps.
        column: Column that lists the texts of the steps; None where a pattern finds them.
    """

    pattern: Pattern | None = None
    column: str | None = None


def parse_delimiter(option: str, flag: str = "--data.step_delimiter") -> StepDelimiter:
    """Parses what an option says about the ends of steps.

    Args:
        option: Its value; see above.
        flag: The option, for errors.

    Raises:
        InputError: If it is empty, no regular expression, or one that matches the empty text.
    """
    name = f"{flag} {option!r}"
    if option.startswith(COLUMN):
        if not (column := option.removeprefix(COLUMN)):
            raise InputError(f"{name}: expected the name of a column after {COLUMN}")
        return StepDelimiter(column=column)
    if not option.startswith(REGULAR):
        if not option:
            raise InputError(f"{name}: expected a text, {REGULAR}REGULAR_EXPRESSION or {COLUMN}NAME")
        text = _ESCAPE.sub(lambda match: _ESCAPED[match[1]], option)
        return StepDelimiter(Pattern.compile(regex.escape(text), name))
    pattern = Pattern.compile(option.removeprefix(REGULAR), name)
    if pattern.find(""):
        raise InputError(f"{name}: it matches the empty text; expected one that matches what ends a step")
    return StepDelimiter(pattern)


def delimited_ends(text: str, pattern: Pattern) -> list[int]:
    """Finds where the steps of a text end.

    Args:
        text: The text of a response.
        pattern: Matches a delimiter.

    Returns:
        End of each step, exclusive, in characters; the last one is that of the text.

    Raises:
        InputError: If there is no end to searching the text.
    """
    ends: list[int] = []
    begin = 0  # of what follows the last delimiter
    for match in pattern.find(text):
        if text[begin : match.start()].strip():
            ends.append(match.end())
        elif ends:
            ends[-1] = match.end()
        begin = match.end()
    if text[begin:].strip() or not ends:
        return [*ends, len(text)]
    return [*ends[:-1], len(text)]


def listed_ends(text: str, steps: Any, where: str) -> list[int]:
    """Finds where the steps of a text end, from their texts; what stands between two belongs to the earlier one.

    Args:
        text: The text of a response.
        steps: Texts of its steps, in order; spaces around them do not matter.
        where: File, row and column, for errors.

    Returns:
        See `delimited_ends`.

    Raises:
        InputError: If they are no texts, or do not spell the response.
    """
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        raise InputError(f"{where}: found {steps!r}; expected a list of the texts of the steps, none of them empty")
    begins, place = [], 0
    for number, step in enumerate(map(str.strip, steps), start=1):
        begin = text.find(step, place)
        if begin < 0 or text[place:begin].strip():
            raise InputError(
                f"{where}: step {number}, {step[:40]!r}, does not stand where it should in the response, which goes on "
                f"with {text[place:].lstrip()[:40]!r}; the steps spell the response, but for spaces between them"
            )
        begins.append(begin)
        place = begin + len(step)
    if text[place:].strip():
        raise InputError(f"{where}: the response goes on after the last step, with {text[place:].lstrip()[:40]!r}")
    return [*begins[1:], len(text)]


def steps_of_tokens(pieces: Sequence[str], ends: Sequence[int]) -> list[int]:
    """Finds the step of each token: that in which its first character stands, spaces before a word aside.

    Args:
        pieces: Text of each token; a token that holds only a part of a character has none.
        ends: See `delimited_ends`.

    Returns:
        Step of each token, from 0. A step all of whose characters belong to a token that began earlier has no tokens.
    """
    begins = np.cumsum([0, *map(len, pieces)])[:-1]
    spaces = np.array([len(piece) - len(piece.lstrip(" ")) if piece.strip(" ") else 0 for piece in pieces], int)
    return np.searchsorted(ends[:-1], begins + spaces, side="right").tolist()


def find_steps(
    pieces: Sequence[str],
    turns: Sequence[int],
    delimiter: StepDelimiter,
    *,
    closing: Collection[int] = (),
    listed: Any = None,
    where: str = "",
) -> tuple[int, ...]:
    """Finds the step of each token of a response.

    Args:
        pieces: Text of each token.
        turns: Turn of the policy to which each token belongs; negative where it is no action.
        delimiter: What ends a step.
        closing: Places of special tokens; those that end a turn, such as EOS, are no text, and belong to its last step.
        listed: Texts of the steps, where a column lists them.
        where: File and row, for errors.

    Returns:
        Step of each token, from 0, counted over all turns; -1 where it is no action.

    Raises:
        InputError: If listed steps do not spell the response, or it has several turns.
    """
    steps, count = [NO_STEP] * len(pieces), 0
    numbers = sorted({turn for turn in turns if turn >= 0})
    if delimiter.column is not None and len(numbers) > 1:
        raise InputError(f"{where}: column {delimiter.column!r} lists steps, but the response has several turns")
    for number in numbers:
        places = [place for place, turn in enumerate(turns) if turn == number]
        spoken = places
        while spoken and (spoken[-1] in closing or not pieces[spoken[-1]].strip()):
            spoken = spoken[:-1]
        said = [pieces[place] if place in set(spoken) else "" for place in places]
        text = "".join(said)
        if delimiter.pattern is None:
            ends = listed_ends(text, listed, f"{where}, column {delimiter.column!r}")
        else:
            ends = delimited_ends(text, delimiter.pattern)
        for place, step in zip(places, steps_of_tokens(said, ends), strict=True):
            steps[place] = count + step
        count += len(ends)
    return tuple(steps)
