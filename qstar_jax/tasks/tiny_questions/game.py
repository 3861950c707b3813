"""The game: someone thinks of a thing; one may ask whether it has an attribute, and must name it within seven turns.

Each dialogue has its own answerer, who may be wrong about some attributes of the thing, and then is so each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool

THINGS = tuple("mug lamp tent boat bike piano table sofa guitar camera phone desk chair mirror clock carpet".split())
ATTRIBUTES = tuple("red big soft old round heavy".split())
OPENING = "what is it ?"
TURNS = 7
QUESTION, RIGHT, WRONG = -0.05, 1.0, -1.0
NOISE = 0.1  # how often a noisy answerer is wrong about an attribute


@dataclass(frozen=True)
class Game:
    """The things of one seed.

    Attributes:
        seed: Seed of the attributes.
        noise: Probability that an answerer is wrong about an attribute.
    """

    seed: int = 0
    noise: float = 0.0

    @cached_property
    def features(self) -> Bool[np.ndarray, "things attributes"]:
        """Which thing has which attribute; no two things have the same."""
        codes = np.random.default_rng(self.seed).choice(2 ** len(ATTRIBUTES), len(THINGS), replace=False)
        return codes[:, None] >> np.arange(len(ATTRIBUTES)) & 1 == 1

    def answerer(self, thing: int, rng: np.random.Generator) -> Bool[np.ndarray, " attributes"]:
        """Draws what an answerer thinks of a thing's attributes."""
        return self.features[thing] ^ (rng.random(len(ATTRIBUTES)) < self.noise)


def ask(attribute: int) -> str:
    """Writes a question."""
    return f"{ATTRIBUTES[attribute]} ?"


def guess(thing: int) -> str:
    """Writes a guess."""
    return f"{THINGS[thing]} !"


def parse(turn: str) -> int | None:
    """Reads a turn: 0 to 5 are questions, 6 to 21 guesses, None is neither."""
    return _ACTIONS.get(turn)


_ACTIONS = {text: n for n, text in enumerate([*map(ask, range(len(ATTRIBUTES))), *map(guess, range(len(THINGS)))])}
ACTIONS = tuple(_ACTIONS)


def reply(opinion: Bool[np.ndarray, " attributes"], turns: Sequence[str]) -> str | None:
    """Answers the last of the player's turns.

    Args:
        opinion: See `Game.answerer`.
        turns: The player's turns so far, at least one.

    Returns:
        "yes", "no", or "what ?" for what is no question; None where the game ends: after a guess, and after 7 turns.
    """
    action = parse(turns[-1])
    if len(turns) == TURNS or (action is not None and action >= len(ATTRIBUTES)):
        return None
    if action is None:
        return "what ?"
    return "yes" if opinion[action] else "no"


def true_return(thing: int, turns: Sequence[str]) -> float:
    """Sums the rewards of a finished game: -0.05 a question, 1 for a right guess, -1 for a wrong one or none."""
    guessed = parse(turns[-1]) == len(ATTRIBUTES) + thing
    is_guess = (parse(turns[-1]) or 0) >= len(ATTRIBUTES)
    return QUESTION * (len(turns) - is_guess) + (RIGHT if guessed else WRONG)
