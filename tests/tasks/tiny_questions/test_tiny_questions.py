"""The game of questions: its rules, its player, its tokens, and values against enumeration and against games played."""

import math

import numpy as np
import pytest

from qstar_jax.data.reading import read_rows
from qstar_jax.errors import InputError
from qstar_jax.store.hub import open_folder
from qstar_jax.tasks.tiny_questions.beliefs import ASKED, GUESSED, Beliefs, learn, player_return, solve
from qstar_jax.tasks.tiny_questions.game import (
    ACTIONS,
    ATTRIBUTES,
    OPENING,
    QUESTION,
    THINGS,
    TURNS,
    Game,
    ask,
    guess,
    parse,
    reply,
    true_return,
)
from qstar_jax.tasks.tiny_questions.rows import TEMPERATURE, documents, lists, split_rows
from qstar_jax.tasks.tiny_questions.tokenizer import make_tokenizer


def dialogue(row, name):
    """Turns and replies of a row."""
    return [m["content"] for m in row[name][::2]], [m["content"] for m in row[name][1::2]]


@pytest.fixture(scope="module")
def rows():
    return split_rows("train", 0, 2000)


def test_rules_by_hand():
    opinion = Game().features[5]
    has = int(np.flatnonzero(opinion)[0])
    lacks = int(np.flatnonzero(~opinion)[0])
    assert reply(opinion, [ask(has)]) == "yes" and reply(opinion, [ask(has), ask(lacks)]) == "no"
    assert reply(opinion, ["mug mug"]) == "what ?" and reply(opinion, [guess(3)]) is None
    assert reply(opinion, [ask(0)] * (TURNS - 1)) is not None and reply(opinion, [ask(0)] * TURNS) is None
    assert true_return(5, [ask(0), ask(1), guess(5)]) == pytest.approx(0.9)
    assert true_return(5, [ask(0), guess(6)]) == pytest.approx(-1.05)
    assert true_return(5, [ask(0)] * TURNS) == true_return(5, [*[ask(0)] * (TURNS - 1), "?"]) == pytest.approx(-1.35)
    assert [parse(text) for text in ACTIONS] == list(range(len(ATTRIBUTES) + len(THINGS)))


def test_things_differ_and_are_drawn_by_the_seed():
    for seed in range(5):
        assert len({tuple(row) for row in Game(seed).features}) == len(THINGS)
    assert (Game(0).features != Game(1).features).any()


def test_a_noisy_answerer_errs_by_its_chance_and_does_not_change_its_mind():
    game, rng = Game(0, 0.1), np.random.default_rng(0)
    opinions = np.array([game.answerer(4, rng) for _ in range(4000)])
    np.testing.assert_allclose((opinions != game.features[4]).mean(0), 0.1, atol=0.02)
    question = [ask(2)]
    assert all(reply(o, question) == reply(o, question * 3) for o in opinions[:20])


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_beliefs_are_bayes_rule_over_things(noise):
    beliefs = Beliefs(game := Game(3, noise))
    belief, weights = 0, np.ones(len(THINGS))
    for attribute, answer in ((2, "yes"), (5, "no"), (2, "yes"), (0, "no")):
        repeated = belief != learn(belief, ask(attribute), answer)
        np.testing.assert_allclose(beliefs.chances[belief, attribute].sum(), 1.0)
        has = game.features[:, attribute] == (answer == "yes")
        if repeated:
            p = np.where(has, 1 - noise, noise)
            np.testing.assert_allclose(
                beliefs.chances[belief, attribute][int(answer == "yes")], (weights * p).sum() / weights.sum()
            )
            weights = weights * p
        belief = learn(belief, ask(attribute), answer)
        np.testing.assert_allclose(beliefs.posterior[belief], weights / weights.sum())
    assert beliefs.gain[belief, 2] == 0.0 and beliefs.gain[0].min() > 0.1
    assert beliefs.entropy[0] == pytest.approx(np.log2(len(THINGS)))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_players_return_is_the_value_without_any_optimization(noise, rows):
    """As beta grows, the optimum is the player itself: V of the start is its mean return over games it played."""
    rows = rows if noise == 0 else split_rows("noisy", 0, 2000)
    value = solve(Game(0, noise), 1e6).v[0, 0]
    returns = [
        true_return(THINGS.index(row["thing"]), dialogue(row, name)[0])
        for row in rows
        for name in ("chosen", "rejected")
    ]
    assert np.mean(returns) == pytest.approx(value, abs=5 * np.std(returns) / math.sqrt(len(returns)) + 0.01)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_return_of_the_optimum_is_what_its_values_say(noise):
    """V(beta) = E[R] - beta KL, so E[R] = V - beta dV / dbeta."""
    game, beta, step = Game(1, noise), 0.1, 1e-5
    low, value, high = (solve(game, b).v[0, 0] for b in (beta - step, beta, beta + step))
    assert player_return(game, beta) == pytest.approx(value - beta * (high - low) / (2 * step), abs=1e-6)
    assert player_return(game, 1e7) == pytest.approx(player_return(game), abs=1e-5)
    assert player_return(game) < player_return(game, 1.0) < player_return(game, beta)


def test_lists_name_all_that_is_possible_and_nothing_else():
    beliefs, shown = Beliefs(Game(2)), set()
    for text in lists(200, seed=2):
        turns = [part.split(" <end>")[0] for part in text.split("<assistant> ")[1:]]
        replies = [part.split(" <end>")[0] for part in text.split("<user> ")[2:]]
        belief = 0
        for turn, answer in zip(turns[:-1], replies, strict=True):
            belief = learn(belief, turn, answer)
        named = [THINGS.index(word) for word in turns[-1].removesuffix(" !").split()]
        possible = np.flatnonzero(beliefs.posterior[belief])
        assert len(set(named)) == len(named) == min(8, len(possible)) and set(named) <= set(possible)
        shown.add(len(named))
    assert {1, 2, 8} <= shown


def test_values_are_those_of_a_search_over_things():
    """The last two turns, by hand: ask and guess, or guess; over every thing that may be meant."""
    game, beta = Game(0), 0.1
    values, beliefs = solve(game, beta), Beliefs(game)
    belief = learn(learn(learn(0, ask(0), "yes"), ask(1), "no"), ask(2), "yes")
    candidates = np.flatnonzero(beliefs.posterior[belief])

    def last(belief):
        law, q = beliefs.law[1, belief], np.full(len(ACTIONS), -1.0)
        things = np.flatnonzero(beliefs.posterior[belief])
        q[len(ATTRIBUTES) + things] = 2 / len(things) - 1
        return beta * np.log((law * np.exp(q / beta)).sum())

    for attribute in range(len(ATTRIBUTES)):
        answers = ["yes" if game.features[thing, attribute] else "no" for thing in candidates]
        expected = QUESTION + np.mean([last(learn(belief, ask(attribute), answer)) for answer in answers])
        assert values.q[TURNS - 2, belief, attribute] == pytest.approx(expected)
    mean = (beliefs.law[0, belief] * np.exp(values.advantages[TURNS - 2, belief] / beta)).sum()
    assert mean == pytest.approx(1.0)  # pi* is a distribution


def test_a_wasted_question_costs_what_it_costs_and_never_helps():
    game = Game(0)
    values, beliefs = solve(game, 0.05), Beliefs(game)
    seen = [b for b in np.flatnonzero(beliefs.possible)[1:300]]
    wasted = beliefs.gain[seen] < 1e-9
    informed = values.q[2, seen][:, ASKED] - values.v[3, seen][:, None] - QUESTION
    np.testing.assert_allclose(
        informed[(beliefs.after[seen] == np.array(seen)[:, None, None]).all(-1)], 0.0, atol=1e-12
    )
    assert (
        wasted.any()
        and values.advantages[2, seen][:, ASKED][wasted].mean() < values.advantages[2, seen][:, ASKED][~wasted].mean()
    )


def test_the_player_repeats_questions_guesses_early_and_only_what_is_possible(rows):
    repeats, questions, sure = 0, 0, []
    beliefs = Beliefs(Game(0))
    for row in rows[:500]:
        turns, replies = dialogue(row, "chosen")
        belief = 0
        for n, turn in enumerate(turns):
            action = parse(turn)
            if action < len(ATTRIBUTES):
                questions += n > 0
                repeats += turn in turns[:n]
                belief = learn(belief, turn, replies[n]) if n < len(replies) else belief
            else:
                assert beliefs.posterior[belief, action - len(ATTRIBUTES)] > 0
                sure.append(beliefs.entropy[belief] == 0)
    assert repeats / questions == pytest.approx(0.2, abs=0.05)
    assert 0.2 < np.mean(sure) < 0.8
    np.testing.assert_allclose(beliefs.law[:, beliefs.possible].sum(-1), 1.0)
    assert (beliefs.law[1][:, ASKED] == 0).all() and beliefs.law[1][:, GUESSED].max() == 1.0


def test_labels_are_bradley_terrys_of_true_returns(rows):
    returns = np.array(
        [
            [true_return(THINGS.index(row["thing"]), dialogue(row, name)[0]) for name in ("chosen", "rejected")]
            for row in rows
        ]
    )
    gap, won = np.abs(returns[:, 0] - returns[:, 1]), returns[:, 0] > returns[:, 1]
    for low, high in ((0.01, 0.3), (1.0, 1.8)):
        part = (gap > low) & (gap <= high)
        expected = np.mean(1 / (1 + np.exp(-gap[part] / TEMPERATURE)))
        assert won[part].mean() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / part.sum()))


def test_rows_are_functions_of_the_seed_and_of_the_split():
    assert read_rows("builtin:tiny-questions?seed=3", "test", 5) == split_rows("test", 3, 9)[:5]
    assert split_rows("test", 3, 5) != split_rows("test", 4, 5) != split_rows("train", 4, 5)
    with pytest.raises(InputError, match="no split 'dev'; expected one of train, test, noisy, noisy_test"):
        read_rows("builtin:tiny-questions", "dev")


def test_there_is_no_base_model():
    with pytest.raises(InputError, match="has data but no base model"):
        open_folder("builtin:tiny-questions")


def test_texts_are_the_rendered_messages_a_token_a_word(rows):
    tokenizer = make_tokenizer()
    for text in documents(200, seed=0):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split()) < 64
        assert tokenizer.decode(ids) == text and text.startswith(f"<user> {OPENING} <end> <assistant>")
    row = rows[0]
    rendered = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    turns, replies = dialogue(row, "chosen")
    assert rendered.split("<assistant> ")[1] == f"{turns[0]} <end>" + (
        f" <user> {replies[0]} <end> " if replies else ""
    )
    assert make_tokenizer("<eos>").eos_token == "<eos>" and tokenizer.eos_token == "<end>"
