"""Sums, and how they are worked out: `27 + 8 + 3 + 9 =`, then a step per operand, and the answer after a `#`.

A step ends with a semicolon and goes on from the number before it, right or wrong. All numbers but the operands have
two digits, whatever slips.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from zlib import crc32

LENGTHS = (3, 4, 5)
DELIMITER, MARK = ";", "#"  # what ends a step, and what comes before the answer
_STARTS, _OPERANDS = range(10, 50), range(1, 10)
_PROMPT = re.compile(r"\d{1,9}(?: \+ \d)+ =")


@dataclass(frozen=True)
class Sum:
    """A sum.

    Attributes:
        start: Its first number.
        operands: What is added: one digit each.
    """

    start: int
    operands: tuple[int, ...]

    @cached_property
    def prompt(self) -> str:
        """The sum as text."""
        return f"{self.start}{''.join(f' + {operand}' for operand in self.operands)} ="

    @cached_property
    def results(self) -> tuple[int, ...]:
        """The right result of each step."""
        results, value = [], self.start
        for operand in self.operands:
            value += operand
            results.append(value)
        return tuple(results)

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.results[-1]

    def write(self, results: Sequence[int]) -> str:
        """Writes a solution that has some result, right or wrong, at each step."""
        before = (self.start, *results)
        steps = [step_text(*step) for step in zip(before, self.operands, results, strict=False)]
        return "".join([*steps, answer_text(results[-1])])


def step_text(value: int, operand: int, result: int) -> str:
    """Writes a step, its delimiter included."""
    return f" {value} + {operand} = {result} {DELIMITER}"


def answer_text(value: int) -> str:
    """Writes what comes after the last step."""
    return f" {MARK} {value}"


def draw_sum(rng: Random, *, held_out: bool) -> Sum:
    """Draws a sum.

    Args:
        rng: Where it is drawn from.
        held_out: Whether it is one of the tenth of all sums that is never trained on.
    """
    while True:
        drawn = Sum(rng.choice(_STARTS), tuple(rng.choices(_OPERANDS, k=rng.choice(LENGTHS))))
        if (crc32(drawn.prompt.encode()) % 10 == 0) == held_out:
            return drawn


def read_sum(prompt: str) -> Sum | None:
    """Reads a prompt; None if it is not one of this task."""
    text = prompt.strip()
    if not _PROMPT.fullmatch(text):
        return None
    start, *operands = map(int, text.removesuffix(" =").split(" + "))
    return Sum(start, tuple(operands))


def read_answer(response: str) -> int | None:
    """Reads the number after the last `#`; None if there is none."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*", response.rpartition(MARK)[2]) if MARK in response else None
    return int(found[1]) if found else None


def true_reward(prompt: str, response: str) -> float | None:
    """Returns 1 for the right answer and 0 for any other, whatever the steps say; None if the prompt is not a sum."""
    known = read_sum(prompt)
    return None if known is None else float(read_answer(response) == known.answer)
