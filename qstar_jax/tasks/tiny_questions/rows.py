"""Dialogues of the mediocre player: pairs about one thing, labelled by their returns; and texts to learn from."""

from functools import lru_cache

import numpy as np

from qstar_jax.tasks.tiny_questions.beliefs import Beliefs, learn
from qstar_jax.tasks.tiny_questions.game import (
    ACTIONS,
    ATTRIBUTES,
    NOISE,
    OPENING,
    THINGS,
    TURNS,
    Game,
    ask,
    reply,
    true_return,
)

SPLITS = ("train", "test", "noisy", "noisy_test")
ROWS = {"train": 20_000, "test": 1_000, "noisy": 20_000, "noisy_test": 1_000}
TEMPERATURE = 0.25  # of the labels: return per nat

_DOCUMENTS, _LISTS = 100, 101  # seeds of texts, beside the numbers of the splits
_LISTED = 8  # things of a list at most

Messages = list[dict[str, str]]


def split_rows(split: str, seed: int = 0, limit: int | None = None) -> list[dict]:
    """Makes one split of the task.

    Args:
        split: All hold pairs of dialogues that a mediocre player had about the same `thing`: `prompt`, `chosen` and
            `rejected` are messages, and labels are drawn by Bradley-Terry of the true returns / 0.25. The answerers of
            `noisy` and `noisy_test` err, each in its own way.
        seed: Seed of the things' attributes and of the rows.
        limit: Make only the first N rows.

    Raises:
        ValueError: If there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; expected one of {', '.join(SPLITS)}")
    game = Game(seed, NOISE if split.startswith("noisy") else 0.0)
    rng = np.random.default_rng([SPLITS.index(split), seed])
    return [_pair(game, rng) for _ in range(ROWS[split] if limit is None else min(limit, ROWS[split]))]


def documents(count: int, seed: int, noise: float = 0.0) -> list[str]:
    """Makes texts that teach the mediocre player's habits: its dialogues, as text."""
    game, rng = Game(seed, noise), np.random.default_rng([_DOCUMENTS, seed])
    return [as_text(opening() + as_messages(*_play(game, int(rng.integers(len(THINGS))), rng))) for _ in range(count)]


def lists(count: int, seed: int, noise: float = 0.0) -> list[str]:
    """Makes texts that teach the things of a seed: some questions, then what it may be, at most eight, in any order.

    They teach it faster than dialogues, which name one thing each.
    """
    game, rng = Game(seed, noise), np.random.default_rng([_LISTS, seed])
    beliefs, texts = Beliefs(game), []
    for _ in range(count):
        opinion, belief = game.answerer(int(rng.integers(len(THINGS))), rng), 0
        attributes = rng.permutation(len(ATTRIBUTES))[: rng.integers(1, len(ATTRIBUTES))]
        turns = [ask(attribute) for attribute in attributes]
        replies = [str(reply(opinion, turns[: n + 1])) for n in range(len(turns))]
        for turn, answer in zip(turns, replies, strict=True):
            belief = learn(belief, turn, answer)
        best = rng.permutation(np.flatnonzero(beliefs.best[belief]))[:_LISTED]
        named = " ".join(THINGS[thing] for thing in best)
        texts.append(as_text(opening() + as_messages([*turns, f"{named} !"], replies)))
    return texts


def opening() -> Messages:
    """Returns the messages with which all dialogues begin."""
    return [{"role": "user", "content": OPENING}]


def as_messages(turns: list[str], replies: list[str]) -> Messages:
    """Turns and replies, one fewer, as messages."""
    messages = []
    for turn, answer in zip(turns, [*replies, None], strict=True):
        messages += [{"role": "assistant", "content": turn}, {"role": "user", "content": answer}]
    return messages[:-1]


def as_text(messages: Messages) -> str:
    """Renders messages as the task's chat template does."""
    return " ".join(f"<{message['role']}> {message['content']} <end>" for message in messages)


@lru_cache(maxsize=4)
def _cumulative_law(game: Game) -> np.ndarray:
    return Beliefs(game).law.cumsum(-1)


def _pair(game: Game, rng: np.random.Generator) -> dict:
    thing = int(rng.integers(len(THINGS)))
    games = [_play(game, thing, rng) for _ in range(2)]
    while games[0] == games[1]:
        games[1] = _play(game, thing, rng)
    # Bradley-Terry: the first is preferred with probability sigmoid(margin).
    first, second = (true_return(thing, turns) for turns, _ in games)
    if rng.random() >= 1 / (1 + np.exp((second - first) / TEMPERATURE)):
        games.reverse()
    chosen, rejected = (as_messages(*dialogue) for dialogue in games)
    return {"prompt": opening(), "chosen": chosen, "rejected": rejected, "thing": THINGS[thing]}


def _play(game: Game, thing: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Plays a game as the mediocre player does; returns its turns and the replies."""
    law, opinion, belief = _cumulative_law(game), game.answerer(thing, rng), 0
    turns, replies = [], []
    while True:
        chances = law[int(len(turns) == TURNS - 1), belief]
        turns.append(ACTIONS[int(np.searchsorted(chances, rng.random() * chances[-1], "right"))])
        answer = reply(opinion, turns)
        if answer is None:
            return turns, replies
        replies.append(answer)
        belief = learn(belief, turns[-1], answer)
