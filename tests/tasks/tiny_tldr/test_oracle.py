from itertools import combinations
from random import Random

import numpy as np
import pytest

from qstar_jax.store.hub import read_tokenizer
from qstar_jax.tasks.tiny_tldr import BASE
from qstar_jax.tasks.tiny_tldr.oracle import Oracle
from qstar_jax.tasks.tiny_tldr.posts import FILLERS, make_post
from qstar_jax.tasks.tiny_tldr.rewards import END, LATE_WORD, RIGHT, WORD, WRONG, split_words, true_reward
from qstar_jax.tasks.tiny_tldr.summaries import (
    EMPTY,
    EXTRAS,
    FORMS,
    RUN_ON,
    draw_summary,
    invent,
)
from qstar_jax.tasks.tiny_tldr.summaries import (
    RIGHT as CHANCES,
)

BETA = 0.7


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(BASE)


@pytest.fixture(scope="module")
def oracle(tokenizer):
    return Oracle(lambda text: tokenizer(text).input_ids, tokenizer.eos_token_id, BETA)


def ids(tokenizer, text):
    return [*tokenizer(text).input_ids, tokenizer.eos_token_id]


@pytest.mark.thin("0")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_advantages_telescope_to_the_true_reward(seed, tokenizer, oracle):
    """r(y) - sum of advantages is V*(s_0), the same for all summaries of a post; and beta log E_mu exp(r / beta)."""
    rng = Random(seed)
    post = make_post(rng)
    drawn = [draw_summary(post, rng) for _ in range(4000)]
    rewards = np.array([true_reward(post, text) for text in drawn])
    values = [
        reward - oracle.advantages(post, ids(tokenizer, text)).sum()
        for text, reward in zip(drawn[:25], rewards[:25], strict=True)
    ]
    np.testing.assert_allclose(values, values[0], atol=1e-9)
    weights = np.exp(rewards / BETA)
    error = BETA * weights.std() / weights.mean() / len(weights) ** 0.5
    assert values[0] == pytest.approx(BETA * np.log(weights.mean()), abs=4 * error)


def test_advantages_telescope_with_words_that_change_nothing_and_run_ons(tokenizer, oracle):
    post = make_post(Random(3))
    nothing = dict.fromkeys(EXTRAS, "")
    said = [nothing | {place: phrase} for place, phrases in EXTRAS.items() for phrase in phrases]
    said += [nothing | {place: EXTRAS[place][0] for place in places} for places in combinations(EXTRAS, 2)]
    said += [nothing, {place: phrases[-1] for place, phrases in EXTRAS.items()}]
    texts = [FORMS[0].text.format(**post.facts, **extras) for extras in said]
    texts += [f"{text} {filler}" for text in texts[-2:] for filler in FILLERS]
    values = [true_reward(post, text) - oracle.advantages(post, ids(tokenizer, text)).sum() for text in texts]
    np.testing.assert_allclose(values, values[0], atol=1e-9)


def test_words_that_change_nothing_and_ends_have_the_advantages_of_their_chances(tokenizer, oracle):
    """The rest of a summary is the same whatever they are, so only their own costs and chances count."""

    def value(rewards, chance, reward):
        """beta log E exp(reward / beta): one reward by its chance, else any of others that are equally likely."""
        other = np.mean(np.exp(np.array(rewards) / BETA))
        return BETA * np.log(chance * np.exp(reward / BETA) + (1 - chance) * other)

    def words(text, cost):
        return cost * sum(word.isalnum() for word in split_words(text))

    def gained(begun, piece):
        """Sum of the advantages of the tokens of a piece behind what is begun."""
        start = len(tokenizer(begun).input_ids)
        found = oracle.advantages(post, tokenizer(begun + piece).input_ids)
        assert found.size > start
        return found[start:].sum()

    post = make_post(Random(4))
    who, what, much, where = (post.facts[fact] for fact in ("who", "what", "much", "where"))
    begun = {
        "adverb": f" {who}",
        "about": f" {who} {what} at {where} for",  # behind what was done, it could go on with "for now"
        "tail": f" {who} {what} for {much} dollars",
    }
    expected = {
        place: value([words(phrase, WORD) for phrase in phrases], EMPTY, 0.0) for place, phrases in EXTRAS.items()
    }
    for place, phrases in EXTRAS.items():
        for phrase in phrases:
            assert gained(begun[place], phrase) == pytest.approx(words(phrase, WORD) - expected[place], abs=1e-9)
    assert gained(begun["tail"], ".") == pytest.approx(-expected["tail"], abs=1e-9)

    whole = begun["tail"] + "."
    late = [words(filler, LATE_WORD) for filler in FILLERS]
    ended = value(late, 1 - RUN_ON, END)
    assert oracle.advantages(post, ids(tokenizer, whole))[-1] == pytest.approx(END - ended)
    for filler, cost in zip(FILLERS, late, strict=True):
        assert gained(whole, f" {filler}") == pytest.approx(cost - ended)
        assert oracle.advantages(post, ids(tokenizer, f"{whole} {filler}"))[-1] == pytest.approx(0, abs=1e-9)


def test_a_right_amount_has_the_advantage_of_its_chance(tokenizer, oracle):
    rng = Random(7)
    posts = [make_post(rng) for _ in range(20)]
    chances = set()
    for post in posts:
        begun = f" {post.facts['who']} {post.facts['what']} for just"
        whole = tokenizer(f"{begun} {post.facts['much']} dollars").input_ids
        chances.add(chance := CHANCES["much"][("much" not in post.distractors)])
        worth = np.exp((RIGHT["much"] - WRONG) / BETA)  # of a right amount, against a wrong one
        expected = BETA * np.log(worth / (chance * worth + 1 - chance))
        found = oracle.advantages(post, whole)[len(tokenizer(begun).input_ids) :]
        assert found.sum() == pytest.approx(expected, abs=1e-9)
    assert len(chances) == 2


def test_advantages_of_the_first_tokens_are_those_of_drawn_summaries(tokenizer, oracle):
    """Their sum is beta log of how much better, in exp(r / beta), the summaries are that begin with these tokens."""
    rng = Random(6)
    post = make_post(rng)
    drawn = [draw_summary(post, rng) for _ in range(8000)]
    weights = np.exp(np.array([true_reward(post, text) for text in drawn]) / BETA)
    begun = {}
    for i, text in enumerate(tokenizer(drawn).input_ids):
        for end in range(1, 9):
            begun.setdefault(tuple(text[:end]), []).append(i)
    common = {tokens: weights[rows] for tokens, rows in begun.items() if len(rows) > 300}
    assert len(common) > 30
    for tokens, part in common.items():
        error = sum((sample.std() / sample.mean()) ** 2 / sample.size for sample in (part, weights)) ** 0.5
        expected = np.log(part.mean() / weights.mean())
        assert oracle.advantages(post, tokens).sum() / BETA == pytest.approx(expected, abs=5 * error)


def test_a_wrong_fact_has_the_lowest_advantage_at_its_first_wrong_token(tokenizer, oracle):
    rng = Random(5)
    post = make_post(rng)
    wrong = invent(post, "much", rng)
    right = f" {post.facts['who']} {post.facts['what']} for {{}} dollars."
    good, bad = ids(tokenizer, right.format(post.facts["much"])), ids(tokenizer, right.format(wrong))
    first = next(i for i, (a, b) in enumerate(zip(good, bad, strict=True)) if a != b)
    assert np.argmin(oracle.advantages(post, bad)) == first
    assert oracle.advantages(post, good).min() > -0.5


def test_what_no_writer_would_write_has_no_advantage(tokenizer, oracle):
    found = oracle.advantages(make_post(Random(0)), ids(tokenizer, " So it rained all week."))
    assert np.isfinite(found[:2]).all() and np.isnan(found[2:]).all()


def test_the_temperature_changes_advantages(tokenizer):
    post = make_post(Random(0))
    text = ids(tokenizer, f" {post.facts['who']} {post.facts['what']}.")
    found = [
        Oracle(lambda text: tokenizer(text).input_ids, tokenizer.eos_token_id, beta).advantages(post, text)
        for beta in (0.1, 1.0)
    ]
    assert not np.allclose(*found)
