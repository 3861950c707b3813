import pytest

from qstar_jax.tasks.tiny_tldr import reward_of_text
from qstar_jax.tasks.tiny_tldr.posts import FILLERS, PREAMBLES, Post
from qstar_jax.tasks.tiny_tldr.rewards import split_words, true_reward, true_rewards
from qstar_jax.tasks.tiny_tldr.summaries import EXTRAS

POST = Post(
    text="",
    facts={"who": "Anna Berg", "what": "sold a red bike", "much": "340", "where": "Old Mill", "when": "May 14"},
    distractors={},
    names={},
)


def by_word(summary):
    words = [*split_words(summary), "<end>"]
    rewards = zip(words, true_rewards(POST, summary), strict=True)
    return {f"{i} {word}": round(reward, 6) for i, (word, reward) in enumerate(rewards)}


def test_right_facts_are_paid_at_their_last_word_and_words_cost():
    assert by_word(" Anna Berg sold a red bike for 340 dollars.") == {
        "0 Anna": -0.08, "1 Berg": 0.92, "2 sold": -0.08, "3 a": -0.08, "4 red": -0.08, "5 bike": 0.92,
        "6 for": -0.08, "7 340": 0.92, "8 dollars": -0.08, "9 .": 0.0, "10 <end>": 0.5,
    }  # fmt: skip


def test_a_wrong_fact_costs_at_its_first_wrong_word():
    found = by_word(" Anna Holt sold a blue bike at Old Park.")
    assert {word: reward for word, reward in found.items() if reward < -0.5} == {
        "1 Holt": -1.58, "4 blue": -1.58, "8 Park": -1.58,
    }  # fmt: skip


def test_words_that_change_nothing_cost_their_length_and_no_more():
    plain = " Anna Berg{adverb} sold a red bike for{about} 340 dollars{tail}."
    without = true_reward(POST, plain.format(adverb="", about="", tail=""))
    for place, phrases in EXTRAS.items():
        for phrase in phrases:
            text = plain.format(**{sign: "" for sign in EXTRAS} | {place: phrase})
            assert true_reward(POST, text) == pytest.approx(without - 0.08 * len(phrase.split()))


@pytest.mark.parametrize("text", [*PREAMBLES, *FILLERS])
def test_openings_and_fillers_state_no_fact(text):
    words = split_words(text)
    while words[-1] in ",.?":
        words.pop()
    costs = [-0.08 if word != "," else 0.0 for word in words]
    assert true_rewards(POST, " ".join(words)) == [*costs, 0.0]
    assert true_reward(POST, f" Anna Berg. {' '.join(words)}") == pytest.approx(0.84 + 0.3 / 0.08 * sum(costs))


def test_half_a_value_is_wrong():
    found = by_word(" Anna sold a red bike.")
    assert found["0 Anna"] == -1.58 and found["4 bike"] == 0.92


def test_a_fact_is_paid_once_and_wrong_each_time():
    once, twice = true_reward(POST, " Anna Berg."), true_reward(POST, " Anna Berg Anna Berg.")
    assert twice == pytest.approx(once - 2 * 0.08)
    wrong_twice = true_reward(POST, " Ida Berg Ida Berg.")
    assert wrong_twice == pytest.approx(2 * (-1.5 - 2 * 0.08) + 0.5)


def test_running_on_costs_more_and_loses_the_end():
    found = by_word(" Anna Berg. So Anna")
    assert found["3 So"] == found["4 Anna"] == -0.3 and found["5 <end>"] == 0.0


@pytest.mark.parametrize(("text", "reward"), [("", 0.0), (".", 0.5), ("So", -0.08), (". .", 0.0), ("\x1b?!", 0.0)])
def test_any_text_has_a_reward(text, reward):
    assert true_reward(POST, text) == pytest.approx(reward)


def test_no_reward_without_a_post():
    assert reward_of_text("What is the capital of France?", " Paris.") is None
