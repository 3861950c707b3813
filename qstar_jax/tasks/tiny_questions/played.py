"""Games that were played, and what each of their turns was worth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from qstar_jax.tasks.tiny_questions.beliefs import Beliefs, TurnValues, learn
from qstar_jax.tasks.tiny_questions.game import ATTRIBUTES, THINGS, parse, true_return

_NO_GAIN = 1e-9  # bits; the rounding of entropies is below it


@dataclass(frozen=True)
class Played:
    """A game that was played.

    Attributes:
        thing: Number of the thing that was to be found.
        turns: The player's turns, L of them.
        replies: The replies to all turns but the last.
    """

    thing: int
    turns: tuple[str, ...]
    replies: tuple[str, ...]

    @classmethod
    def from_row(cls, row: dict, column: str) -> "Played":
        """Reads a dialogue of a row of the task: its `chosen` or its `rejected` one."""
        contents = [message["content"] for message in row[column]]
        return cls(THINGS.index(row["thing"]), tuple(contents[::2]), tuple(contents[1::2]))

    @property
    def true_return(self) -> float:
        """Sum of the true rewards."""
        return true_return(self.thing, self.turns)

    @property
    def actions(self) -> list[int | None]:
        """What each turn was, see `game.parse`."""
        return [parse(turn) for turn in self.turns]

    @property
    def beliefs(self) -> Int[np.ndarray, " L"]:
        """Belief before each turn, see `beliefs.Beliefs`."""
        states = [0]
        for turn, answer in zip(self.turns[:-1], self.replies, strict=True):
            states.append(learn(states[-1], turn, answer))
        return np.array(states)

    @property
    def is_question(self) -> Bool[np.ndarray, " L"]:
        """Which turns are no guesses: what is neither a question nor a guess takes a turn without bringing anything."""
        return np.array([action is None or action < len(ATTRIBUTES) for action in self.actions])

    def bits(self, beliefs: Beliefs) -> Float[np.ndarray, " L"]:
        """Bits of information that each turn brought; the last turn, and what is no question, bring none.

        With noisy answerers a surprising answer may leave more things in doubt than before; then they are negative.
        """
        entropy = beliefs.entropy[self.beliefs]
        return np.append(entropy[:-1] - entropy[1:], 0.0)

    def is_wasted(self, beliefs: Beliefs) -> Bool[np.ndarray, " L"]:
        """Which turns are questions whose answer was known before they were asked."""
        states = zip(self.beliefs, self.actions, self.is_question, strict=True)
        return np.array([bool(q) and (a is None or beliefs.gain[s, a] < _NO_GAIN) for s, a, q in states])

    def advantages(self, values: TurnValues) -> Float[np.ndarray, " L"]:
        """Exact advantage of each turn, which must be a question or a guess, in units of return."""
        states = zip(self.beliefs, self.actions, strict=True)
        return np.array([values.advantages[turn, s, a] for turn, (s, a) in enumerate(states)])


def split_return(
    games: Sequence[Played], values: TurnValues
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Splits the returns of N games, less the value of the start, into skill and luck.

    Returns:
        Sums of the turns' advantages, which an optimal policy's implicit rewards are; and what the environment added,
        by its replies and by the thing it had in mind.
    """
    skill = np.array([game.advantages(values).sum() for game in games])
    returns = np.array([game.true_return for game in games])
    return skill, returns - values.v[0, 0] - skill
