"""Somebody who works out sums and slips: often where a digit is carried, and rarely elsewhere.

At a carry the slip is as likely as not, so its likelihood does not give it away; slips elsewhere are unlikely. Whoever
has slipped goes on from the wrong result, and now and then comes out right by another slip.
"""

from dataclasses import dataclass
from functools import cache
from random import Random

from qstar_jax.tasks.tiny_sums.sums import Sum, step_text

FORGETS = 0.5  # a carry
OFF_BY_ONE = 0.02  # too high by one at any step, and as often too low


@cache
def chances(value: int, operand: int) -> dict[int, float]:
    """Returns the probability of each result of a step.

    Args:
        value: The number at which the step begins.
        operand: What is added.
    """
    right = value + operand
    slips = {right + 1: OFF_BY_ONE, right - 1: OFF_BY_ONE}
    if right // 10 > value // 10:
        slips[right - 10] = FORGETS
    return {right: 1 - sum(slips.values())} | slips


@dataclass(frozen=True)
class Solution:
    """A sum that was worked out, rightly or wrongly.

    Attributes:
        sum: The sum.
        results: The result of each step, L of them.
    """

    sum: Sum
    results: tuple[int, ...]

    @property
    def text(self) -> str:
        """The solution as a response."""
        return self.sum.write(self.results)

    @property
    def is_right(self) -> bool:
        """Whether its answer is right."""
        return self.results[-1] == self.sum.answer

    @property
    def slips(self) -> list[bool]:
        """Which steps are false in themselves; a right step that goes on from a wrong number is none."""
        before = (self.sum.start, *self.results[:-1])
        steps = zip(before, self.sum.operands, self.results, strict=True)
        return [value + operand != result for value, operand, result in steps]

    @property
    def first_error(self) -> int:
        """The first step that is false, from 0; -1 if there is none."""
        return self.slips.index(True) if any(self.slips) else -1

    @property
    def marks(self) -> list[list[int]]:
        """The false results as ranges [start, end) of characters of the text."""
        before, offset, marks = (self.sum.start, *self.results[:-1]), 0, []
        for value, operand, result, is_slip in zip(before, self.sum.operands, self.results, self.slips, strict=True):
            text = step_text(value, operand, result)
            start = offset + text.index("= ") + 2
            marks += [[start, start + len(str(result))]] if is_slip else []
            offset += len(text)
        return marks


def solve(asked: Sum, rng: Random) -> Solution:
    """Works out a sum, with slips."""
    results: list[int] = []
    for operand in asked.operands:
        options = chances(results[-1] if results else asked.start, operand)
        results += rng.choices(list(options), list(options.values()))
    return Solution(asked, tuple(results))
