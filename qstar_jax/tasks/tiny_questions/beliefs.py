"""What a player can know, what a mediocre player does with it, and the exact soft-optimal value of every turn.

A state is a belief and the number of turns taken. A belief is what was answered about each attribute: nothing, no or
yes. All 3^6 = 729 are numbered, by the sum of 3^a times the answer about attribute a; answers to repeated questions
change nothing.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import logsumexp, xlogy

from qstar_jax.tasks.tiny_questions.game import ACTIONS, ATTRIBUTES, QUESTION, RIGHT, THINGS, TURNS, WRONG, Game, parse

UNKNOWN, NO, YES = range(3)
_POWERS = 3 ** np.arange(len(ATTRIBUTES))
_COUNT = 3 ** len(ATTRIBUTES)
ASKED = slice(0, len(ATTRIBUTES))  # actions that are questions
GUESSED = slice(len(ATTRIBUTES), None)  # actions that are guesses

# The mediocre player repeats questions, and guesses too early.
REPEATS = 0.2
GUESSES, GUESSES_IF_SURE = 0.12, 0.7


@dataclass(frozen=True)
class Beliefs:
    """All beliefs P about the things of a game.

    Attributes:
        game: The game.
    """

    game: Game

    @cached_property
    def answers(self) -> Int[np.ndarray, "P attributes"]:
        """What each belief knows of each attribute: `UNKNOWN`, `NO` or `YES`."""
        return np.arange(_COUNT)[:, None] // _POWERS % 3

    @cached_property
    def likelihood(self) -> Float[np.ndarray, "P things"]:
        """Probability of the answers of each belief if one thing is meant."""
        noise, likelihood = self.game.noise, np.ones((_COUNT, len(THINGS)))
        for attribute, has in enumerate(self.game.features.T):
            yes = np.where(has, 1 - noise, noise)
            likelihood *= np.stack([np.ones(len(THINGS)), 1 - yes, yes])[self.answers[:, attribute]]
        return likelihood

    @cached_property
    def possible(self) -> np.ndarray:
        """Which beliefs can occur. Shape [P], bool."""
        return self.likelihood.any(-1)

    @cached_property
    def posterior(self) -> Float[np.ndarray, "P things"]:
        """Probability of each thing; 0 throughout for impossible beliefs."""
        total = self.likelihood.sum(-1, keepdims=True)
        return self.likelihood / np.where(total > 0, total, 1.0)

    @cached_property
    def best(self) -> Bool[np.ndarray, "P things"]:
        """Which things are most probable."""
        return self.likelihood >= self.likelihood.max(-1, keepdims=True) * (1 - 1e-9)

    @cached_property
    def entropy(self) -> Float[np.ndarray, " P"]:
        """Bits that are missing for certainty."""
        return -xlogy(self.posterior, self.posterior).sum(-1) / np.log(2)

    @cached_property
    def after(self) -> Int[np.ndarray, "P attributes 2"]:
        """Belief after a question and the answer no (0) or yes (1); the same one where the answer is known."""
        moved = np.arange(_COUNT)[:, None, None] + _POWERS[:, None] * np.array([NO, YES])
        return np.where((self.answers == UNKNOWN)[..., None], moved, np.arange(_COUNT)[:, None, None])

    @cached_property
    def chances(self) -> Float[np.ndarray, "P attributes 2"]:
        """Probabilities of the answers no and yes to each question; where the answer is known, both entries are 1/2."""
        total = self.likelihood.sum(-1)
        return total[self.after] / np.maximum(total[self.after].sum(-1, keepdims=True), np.finfo(float).tiny)

    @cached_property
    def gain(self) -> Float[np.ndarray, "P attributes"]:
        """Expected bits of information of each question: 0 for wasted ones, asked before or implied."""
        gain = self.entropy[:, None] - (self.chances * self.entropy[self.after]).sum(-1)
        return np.where(self.possible[:, None], np.maximum(gain, 0.0), 0.0)

    @cached_property
    def law(self) -> Float[np.ndarray, "2 P actions"]:
        """Probabilities of the mediocre player's actions before the last turn [0], where it may ask, and in it [1]."""
        # A guess is one of the most probable things.
        best = self.best
        guesses = best / best.sum(-1, keepdims=True)
        # A question is a new one in random order, or, now and then, an old one.
        new = self.answers == UNKNOWN
        repeats = np.where(new.all(-1), 0.0, np.where(new.any(-1), REPEATS, 1.0))[:, None]
        share = lambda mask: mask / np.maximum(mask.sum(-1, keepdims=True), 1)  # noqa: E731
        questions = (1 - repeats) * share(new) + repeats * share(~new)
        guessing = np.where(best.sum(-1) == 1, GUESSES_IF_SURE, GUESSES)[:, None]
        before = np.concatenate([(1 - guessing) * questions, guessing * guesses], axis=1)
        return np.stack([before, np.concatenate([np.zeros_like(questions), guesses], axis=1)])


def learn(belief: int, turn: str, answer: str) -> int:
    """Returns the belief after a turn and the reply to it; only answers to new questions change it."""
    attribute = parse(turn)
    known = attribute is None or attribute >= len(ATTRIBUTES) or belief // _POWERS[attribute] % 3 != UNKNOWN
    return belief if known else belief + int(_POWERS[attribute]) * (YES if answer == "yes" else NO)


@dataclass(frozen=True)
class TurnValues:
    """The optimum of expected return less beta times the divergence from the mediocre player, by turn and belief.

    Attributes:
        q: Expected return of an action and optimal play after it. Shape [TURNS, P, actions].
        v: Value before a turn. Shape [TURNS, P].
    """

    q: Float[np.ndarray, "turns P actions"]
    v: Float[np.ndarray, "turns P"]

    @property
    def advantages(self) -> Float[np.ndarray, "turns P actions"]:
        """Computes q - v = beta log(pi* / player)."""
        return self.q - self.v[..., None]


@lru_cache(maxsize=4)
def solve(game: Game, beta: float) -> TurnValues:
    """Computes the values of all turns by dynamic programming, from the last turn to the first.

    Args:
        game: The game.
        beta: Temperature: return per nat.
    """
    beliefs = Beliefs(game)
    guesses = WRONG + (RIGHT - WRONG) * beliefs.posterior
    q, v = np.zeros((TURNS, _COUNT, len(ACTIONS))), np.zeros((TURNS, _COUNT))
    after = np.full(_COUNT, WRONG)  # no guess in time
    for turn in reversed(range(TURNS)):
        q[turn, :, ASKED] = QUESTION + (beliefs.chances * after[beliefs.after]).sum(-1)
        q[turn, :, GUESSED] = guesses
        law = beliefs.law[int(turn == TURNS - 1)]
        v[turn] = after = beta * logsumexp(q[turn] / beta, b=law, axis=-1)
    return TurnValues(q, v)


def player_return(game: Game, beta: float | None = None) -> float:
    """Computes the expected return of the mediocre player, or, with a temperature, of the optimal policy (`solve`)."""
    beliefs, after = Beliefs(game), np.full(_COUNT, WRONG)
    for turn in reversed(range(TURNS)):
        asked = QUESTION + (beliefs.chances * after[beliefs.after]).sum(-1)
        guessed = WRONG + (RIGHT - WRONG) * beliefs.posterior
        policy = beliefs.law[int(turn == TURNS - 1)]
        if beta is not None:
            policy = policy * np.exp(solve(game, beta).advantages[turn] / beta)
        after = (policy * np.concatenate([asked, guessed], axis=1)).sum(-1)
    return float(after[0])
