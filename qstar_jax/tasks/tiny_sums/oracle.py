"""The exact value of every prefix of a solution, by dynamic programming over what is left and the number it begins at.

The outcome is 0 or 1, so everything follows from the probability p that the solver comes out right: the optimal policy
at temperature beta has q* = beta log E exp(R / beta) = beta log(1 - p + p exp(1 / beta)) after a prefix, and a token's
advantage is what it adds to that.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float

from qstar_jax.tasks.tiny_sums.solver import chances
from qstar_jax.tasks.tiny_sums.sums import DELIMITER, Sum, answer_text, read_sum, step_text


@cache
def success(value: int, operands: tuple[int, ...], answer: int) -> float:
    """Returns the probability that the solver comes out right.

    Args:
        value: The number at which the next step begins.
        operands: What is left to be added.
        answer: The right answer.
    """
    if not operands:
        return float(value == answer)
    options = chances(value, operands[0])
    return sum(chance * success(result, operands[1:], answer) for result, chance in options.items())


def prefix_success(asked: Sum, prefix: str) -> float:
    """Returns the probability that the solver comes out right after the beginning of a solution, in characters.

    Returns:
        The probability; NaN where the solver would not write that.
    """
    # Whole steps lead from number to number.
    value, operands = asked.start, asked.operands
    *steps, begun = prefix.split(DELIMITER)
    for step in steps:
        options = {step_text(value, operands[0], r): r for r in chances(value, operands[0])} if operands else {}
        if (result := options.get(step + DELIMITER)) is None:
            return np.nan
        value, operands = result, operands[1:]
    # The step that has begun may be any whose text begins so.
    if not operands:
        return success(value, (), asked.answer) if answer_text(value).startswith(begun) else np.nan
    options = chances(value, operands[0])
    possible = {r: chance for r, chance in options.items() if step_text(value, operands[0], r).startswith(begun)}
    if not possible:
        return np.nan
    right = sum(chance * success(result, operands[1:], asked.answer) for result, chance in possible.items())
    return right / sum(possible.values())


def soft_value(success: Float[np.ndarray, "*N"], beta: float) -> Float[np.ndarray, "*N"]:
    """Computes q* = beta log E exp(R / beta) of an outcome R that is 1 with the given probability, and else 0."""
    with np.errstate(divide="ignore"):
        return beta * np.logaddexp(np.log1p(-success), np.log(success) + 1 / beta)


class Oracle:
    """Computes what the tokens of solutions were worth.

    Args:
        tokenizer: A Hugging Face tokenizer.
        beta: Temperature of the optimal policy: reward per nat.
    """

    def __init__(self, tokenizer: Any, beta: float):
        self._tokenizer, self._beta = tokenizer, beta

    def values(self, prompt: str, ids: Sequence[int]) -> Float[np.ndarray, " T+1"]:
        """Computes q* before the first and after each token; NaN from the first that the solver would not write."""
        asked = read_sum(prompt)
        if asked is None:
            raise ValueError(f"{prompt!r} is not a sum")
        texts = [self._tokenizer.decode(list(ids[:end]), skip_special_tokens=True) for end in range(len(ids) + 1)]
        return soft_value(np.array([prefix_success(asked, text) for text in texts]), self._beta)

    def advantages(self, prompt: str, ids: Sequence[int]) -> Float[np.ndarray, " T"]:
        """Computes beta log(pi* / solver) of each token; NaN from the first that the solver would not write."""
        return np.diff(self.values(prompt, ids))
