"""Final answers of responses: found by a mark or a pattern, and normalized so that equal numbers are equal texts."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import regex

from qstar_jax.data.patterns import Pattern
from qstar_jax.errors import InputError

Extractor = Callable[[str], str | None]

# A sign after a word or a bracket is an operator: the last number of "16-3" is 3.
_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?(?:/\d+)?")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_BOXED = r"\boxed{"
_LONGEST_NUMBER = 100  # characters; longer ones are compared as text


def after_hash(text: str) -> str | None:
    """The rest of the line after the last "#" (or "####"); None without one."""
    _, mark, rest = text.rpartition("#")
    line = rest.strip().split("\n", 1)[0]
    return line or None if mark else None


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces within it balanced; None without one that closes."""
    start, depth = text.rfind(_BOXED), 1
    if start < 0:
        return None
    content = text[start + len(_BOXED) :]
    for i, character in enumerate(content):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return content[:i] or None
    return None


def marked(text: str) -> str | None:
    r"""What follows the last "#", or what the last \boxed{...} holds: whichever stands later in the text."""
    first, second = (after_hash, boxed) if text.rfind("#") > text.rfind(_BOXED) else (boxed, after_hash)
    return first(text) or second(text)


def last_number(text: str) -> str | None:
    """The last number of the text, such as "18", "-2.5", "1,200" or "3/4"; None without one."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


EXTRACTORS: dict[str, Extractor] = {"marked": marked, "hash": after_hash, "boxed": boxed, "number": last_number}


def pattern_extractor(pattern: str, option: str = "--pattern") -> Extractor:
    r"""Makes an extractor of a regular expression: what its only group matches, at its last match.

    Args:
        pattern: Such as `A: (.+)`; `^` and `$` match at line breaks.
        option: The option that gives it, for errors.

    Raises:
        InputError: It is no regular expression, or has not exactly one group. The extractor raises it where there is no
            end to searching a text.
    """
    compiled = Pattern.compile(pattern, f"{option} {pattern!r}", regex.MULTILINE)
    if (groups := compiled.compiled.groups) != 1:
        raise InputError(
            f"{compiled.name} has {groups} groups; expected one, around the final answer, such as 'A: (.+)'"
        )

    def extract(text: str) -> str | None:
        matches = compiled.find(text)
        return (matches[-1][1] or "").strip() or None if matches else None

    return extract


def find_extractor(how: str, pattern: str | None, *, options: tuple[str, str]) -> Extractor:
    """Finds the extractor that two options name.

    Args:
        how: Name of an extractor, or "pattern".
        pattern: Regular expression of the latter, as for `pattern_extractor`.
        options: The options that give them, for errors.

    Raises:
        InputError: There is no such extractor, or one option lacks the other.
    """
    if (how == "pattern") != (pattern is not None):
        raise InputError(f"{options[1]} and {options[0]} pattern belong together: the pattern finds the final answer")
    if pattern is not None:
        return pattern_extractor(pattern, options[1])
    if how not in EXTRACTORS:
        raise InputError(f"{options[0]} {how!r} is unknown; choose from {', '.join(EXTRACTORS)}, pattern")
    return EXTRACTORS[how]


def normalize(answer: str) -> str:
    r"""Writes equal answers alike: numbers as reduced fractions, other texts without outer marks and double spaces.

    "$1,200.00", "1200" and "1,200 %" become "1200"; "0.5", "2/4" and "\frac{1}{2}" become "1/2". Nothing is computed
    beyond that: "1 + 1" stays as it is.
    """
    text = " ".join(_FRACTION.sub(r"\1\2/\3", answer.replace(r"\$", "$")).split())
    text = text.strip("$ ").rstrip(".%\\ ").removeprefix("$")
    bare = text.replace("$", "")
    if bare and len(bare) <= _LONGEST_NUMBER and _PLAIN_NUMBER.fullmatch(bare):
        number = bare.replace(",", "")
        top, _, bottom = number.partition("/")
        if top.strip("+-") and (not bottom or int(bottom)):
            return str(Fraction(top) / int(bottom or 1))
    return text


def final_answer(text: str, extract: Extractor) -> str | None:
    """The normalized final answer of a response; None if it gives none."""
    answer = extract(text)
    return None if answer is None else normalize(answer) or None


def right_answer(row: Any, column: str, extract: Extractor, *, where: str, option: str) -> str:
    """The normalized right answer of a row: what the extractor finds in it (GSM8K's "... #### 18"), or all of it.

    Args:
        row: The row.
        column: Column of the right answer, or of a solution that ends with it: a text or a number.
        extract: Finds final answers.
        where: File and row, for errors.
        option: The option that names the column, for errors.

    Raises:
        InputError: The row has no answer there.
    """
    value = row.get(column) if isinstance(row, dict) else None
    is_number = type(value) is int or (type(value) is float and math.isfinite(value))
    text = str(value) if is_number or isinstance(value, str) else ""
    if answer := final_answer(text, extract) or normalize(text):
        return answer
    found = ", ".join(map(repr, row)) if isinstance(row, dict) else "no object"
    problem = f"holds {value!r}" if isinstance(row, dict) and column in row else f"is missing (found: {found})"
    raise InputError(
        f"{where}: column {column!r} {problem}; expected the right answer, a text or a finite number, in the column "
        f"that {option} names"
    )
