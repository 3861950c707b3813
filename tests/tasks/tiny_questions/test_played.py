"""Games that were played, against what happens in them by hand, and on average."""

import numpy as np
import pytest

from qstar_jax.tasks.tiny_questions.beliefs import Beliefs, solve
from qstar_jax.tasks.tiny_questions.game import NOISE, QUESTION, THINGS, Game, ask, guess, reply
from qstar_jax.tasks.tiny_questions.played import Played, split_return
from qstar_jax.tasks.tiny_questions.rows import split_rows


def test_questions_by_hand():
    """A repeated question, and what is none, are wasted; so is one whose answer follows from others."""
    game = Game(0)
    beliefs, thing = Beliefs(game), 3
    turns = [ask(0), ask(0), "mug mug", ask(1), ask(2), guess(thing)]
    replies = [str(reply(game.features[thing], turns[: n + 1])) for n in range(5)]
    played = Played(thing, tuple(turns), tuple(replies))
    assert played.true_return == pytest.approx(1 - 5 * 0.05)
    assert played.is_question.tolist() == [True] * 5 + [False]
    # What is left is counted by hand.
    alike = [(game.features[:, :known] == game.features[thing, :known]).all(-1).sum() for known in range(4)]
    left = np.log2([alike[0], alike[1], alike[1], alike[1], alike[2], alike[3]])
    np.testing.assert_allclose(played.bits(beliefs), [*(left[:-1] - left[1:]), 0.0], atol=1e-12)
    assert played.is_wasted(beliefs).tolist()[:4] == [False, True, True, False]
    implied = alike[3] == alike[2]
    assert played.is_wasted(beliefs)[4] == implied and not played.is_wasted(beliefs)[5]


def test_a_question_whose_answer_is_implied_is_wasted():
    game = Game(0)
    beliefs = Beliefs(game)
    belief = next(
        b for b in np.flatnonzero(beliefs.possible) if beliefs.entropy[b] == 0 and beliefs.answers[b].min() == 0
    )
    thing = int(beliefs.posterior[belief].argmax())
    known, unknown = np.flatnonzero(beliefs.answers[belief]), np.flatnonzero(beliefs.answers[belief] == 0)
    turns = (*map(ask, known), ask(unknown[0]), guess(thing))
    played = Played(thing, turns, tuple(str(reply(game.features[thing], turns[:n])) for n in range(1, len(turns))))
    assert played.beliefs[-2] == belief and played.is_wasted(beliefs)[-2]


@pytest.mark.parametrize("split", ["train", "noisy"])
def test_luck_is_zero_on_average_and_larger_with_noisy_answerers(split):
    values = solve(Game(0, NOISE if split == "noisy" else 0.0), 0.1)
    games = [Played.from_row(row, name) for row in split_rows(split, 0, 2000) for name in ("chosen", "rejected")]
    skill, luck = split_return(games, values)
    returns = np.array([game.true_return for game in games])
    np.testing.assert_allclose(values.v[0, 0] + skill + luck, returns)
    assert abs(luck.mean()) < 5 * luck.std() / len(games) ** 0.5
    share = luck.var() / returns.var()
    assert 0.3 < share < 0.8 if split == "train" else share > 0.8
    assert {game.thing for game in games} == set(range(len(THINGS)))


def test_replies_bring_little_luck_and_guesses_most_of_it():
    """What a reply is worth beyond what was expected, V(s') - E V(s'), by hand; the README quotes its share."""
    values = solve(Game(0), 0.075)
    games = [Played.from_row(row, "chosen") for row in split_rows("test", 0, 1000)]
    _, luck = split_return(games, values)

    def of_replies(game):
        states = list(enumerate(zip(game.beliefs, game.actions, strict=True)))
        expected = [values.q[n, s, a] - QUESTION for n, (s, a) in states[:-1]]
        return sum(values.v[n + 1, game.beliefs[n + 1]] - e for n, e in enumerate(expected))

    replies = np.array(list(map(of_replies, games)))
    # The rest of it is the last turn's: whether a guess is right.
    last = [game.true_return - QUESTION * (len(game.turns) - 1) for game in games]
    expected = [values.q[len(g.turns) - 1, g.beliefs[-1], g.actions[-1]] for g in games]
    np.testing.assert_allclose(luck - replies, np.subtract(last, expected), atol=1e-9)
    assert np.mean(replies**2) < 0.1 * np.mean(luck**2)
