"""Plays tiny-questions with models, and measures how they play."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from qstar_jax.decoding.dialogues import DialogueOptions, converse
from qstar_jax.evaluation.intervals import Interval, Statistic, bootstrap
from qstar_jax.store.open import LoadedModel
from qstar_jax.tasks.tiny_questions.beliefs import Beliefs
from qstar_jax.tasks.tiny_questions.game import THINGS, TURNS, Game, reply
from qstar_jax.tasks.tiny_questions.played import Played
from qstar_jax.tasks.tiny_questions.rows import as_messages, opening

_TURN_TOKENS = 4  # a word, a mark, the end of the turn, and one to be wrong with


@dataclass(frozen=True)
class Decoder:
    """How a player's turns are chosen.

    Attributes:
        name: Its name in records.
        games: Games per thing.
        beams: Width of beam search over turns. Beams try several dialogues with one answerer, and the most likely one
            counts; only its questions are counted.
        temperature: Temperature of samples; 0: greedy, or beams.
    """

    name: str
    games: int = 1
    beams: int = 1
    temperature: float = 0.0


@dataclass(frozen=True)
class Games:
    """How one policy plays.

    Attributes:
        policy: Which policy.
        decoder: How its turns are chosen.
        noisy: Whether the answerers err.
        games: Number of games.
        returns: Mean true return.
        success: Share of games in which the thing was found.
        questions: Questions per game.
        bits: Bits of information per question.
        wasted: Share of the questions whose answer was known.
    """

    policy: str
    decoder: str
    noisy: bool
    games: int
    returns: Interval
    success: Interval
    questions: Interval
    bits: Interval
    wasted: Interval


def play(loaded: LoadedModel, game: Game, things: Sequence[int], decoder: Decoder, *, seed: int) -> list[Played]:
    """Lets a model play some games for each thing.

    Args:
        loaded: The model.
        game: The game, with honest or noisy answerers.
        things: What is to be found.
        decoder: How turns are chosen, and how many games there are per thing.
        seed: Seed of the answerers and of the samples.

    Returns:
        The games, those of the first thing first.
    """
    # Every game has an answerer of its own.
    things, rng = np.repeat(things, decoder.games).tolist(), np.random.default_rng(seed)
    opinions = [game.answerer(thing, rng) for thing in things]
    chat = _Chat(loaded.tokenizer)

    def environment(row: int, turns: tuple[tuple[int, ...], ...]) -> list[int] | None:
        answer = reply(opinions[row], [chat.text(turn) for turn in turns])
        return None if answer is None else chat.reply(answer)

    width = max(len(chat.reply(answer)) for answer in ("yes", "no", "what ?"))
    options = DialogueOptions(chat.end, TURNS, _TURN_TOKENS, width, decoder.beams, decoder.temperature)
    dialogues = converse(
        loaded.model, loaded.params, chat.prompt, len(things), environment, options, jax.random.key(seed)
    )
    texts = [tuple(map(chat.text, beams[0].turns)) for beams in dialogues]
    return [
        Played(thing, turns, tuple(str(reply(opinion, turns[:n])) for n in range(1, len(turns))))
        for thing, opinion, turns in zip(things, opinions, texts, strict=True)
    ]


class _Chat:
    """Turns and replies as the tokens that the chat template makes of them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.prompt = self._render(opening(), open_turn=True)
        asked = opening() + as_messages([""], [])
        self._asked = self._render(asked)
        self.end = self._asked[-1]

    def text(self, turn: Sequence[int]) -> str:
        """The words of a turn."""
        return self.tokenizer.decode([token for token in turn if token != self.end])

    def reply(self, answer: str) -> list[int]:
        """What follows the end of a turn, up to where the next one begins."""
        asked = [*opening(), {"role": "assistant", "content": ""}, {"role": "user", "content": answer}]
        return self._render(asked, open_turn=True)[len(self._asked) :]

    def _render(self, messages: list[dict], *, open_turn: bool = False) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
        return self.tokenizer(text).input_ids


@dataclass(frozen=True)
class Sums:
    """Sums over the games of each thing, which are resampled together. Shape [things] each."""

    games: Float[np.ndarray, " things"]
    returns: Float[np.ndarray, " things"]
    found: Float[np.ndarray, " things"]
    questions: Float[np.ndarray, " things"]
    bits: Float[np.ndarray, " things"]
    wasted: Float[np.ndarray, " things"]

    @classmethod
    def of(cls, games: Sequence[Played], game: Game) -> "Sums":
        """Sums over games; `game` says what answers can be trusted."""
        beliefs, things = Beliefs(game), np.array([one.thing for one in games])
        total = lambda values: np.bincount(things, values, len(THINGS))  # noqa: E731
        return cls(
            games=total(None).astype(float),
            returns=total([one.true_return for one in games]),
            found=total([one.true_return > 0 for one in games]),
            questions=total([one.is_question.sum() for one in games]),
            bits=total([one.bits(beliefs).sum() for one in games]),
            wasted=total([one.is_wasted(beliefs).sum() for one in games]),
        )

    def ratio(self, measure: str, per: str) -> Statistic:
        """One sum per another, as a statistic for `bootstrap`."""
        sums, counts = getattr(self, measure), getattr(self, per)

        def ratios(weights: np.ndarray) -> np.ndarray:
            drawn = weights @ counts
            return weights @ sums / np.where(drawn > 0, drawn, np.nan)

        return ratios


def describe_games(games: Sequence[Played], policy: str, decoder: str, noisy: bool, game: Game) -> Games:
    """Measures games; intervals are over things, each with all its games."""
    sums = Sums.of(games, game)

    def interval(measure: str, per: str = "games") -> Interval:
        return bootstrap(sums.ratio(measure, per), len(THINGS))

    return Games(
        policy=policy,
        decoder=decoder,
        noisy=noisy,
        games=len(games),
        returns=interval("returns"),
        success=interval("found"),
        questions=interval("questions"),
        bits=interval("bits", per="questions"),
        wasted=interval("wasted", per="questions"),
    )
