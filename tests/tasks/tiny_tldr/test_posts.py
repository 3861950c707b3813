from random import Random

import pytest

from qstar_jax.tasks.tiny_tldr import read_post
from qstar_jax.tasks.tiny_tldr.posts import CUE, EXTRAS, FACTS, GREETINGS, PREAMBLES, draw_value, make_post


def posts(count, seed=0):
    rng = Random(seed)
    return [make_post(rng) for _ in range(count)]


def test_a_seed_gives_the_same_posts_and_thousands_of_them_differ():
    assert posts(20) == posts(20) != posts(20, seed=1)
    assert len({post.text for post in posts(5000)}) == 5000


def test_a_post_says_its_facts_and_its_distractors():
    for post in posts(500):
        assert set(post.facts) == set(FACTS)
        assert all(value.split()[-1] in post.text for value in post.facts.values())
        for fact, wrong in post.distractors.items():
            assert wrong != post.facts[fact] and wrong.split()[-1] in post.text


def test_each_fact_has_a_distractor_in_some_posts_only():
    for fact in FACTS:
        assert 0.5 < sum(fact in post.distractors for post in posts(1000)) / 1000 < 0.95


def test_some_posts_begin_as_summaries_do():
    begun = [post.text.startswith(PREAMBLES) for post in posts(2000)]
    assert all(post.text.startswith((*PREAMBLES, *GREETINGS)) for post in posts(2000))
    assert sum(begun) / 2000 == pytest.approx(0.25, abs=0.04)


def test_places_for_words_that_change_nothing_are_filled_in_some_posts():
    for sign, phrases in EXTRAS.items():
        said = [post.names[sign] for post in posts(2000)]
        assert set(said) == {"", *phrases}
        assert 1 - said.count("") / 2000 == pytest.approx(0.4, abs=0.05)
        assert sum(post.names[sign] in post.text for post in posts(2000) if post.names[sign]) > 200


def test_a_post_is_read_back_from_its_text():
    for post in posts(1000):
        for text in (post.text, post.prompt):
            found = read_post(text)
            assert (found.text, found.facts, found.distractors) == (post.text, post.facts, post.distractors)


@pytest.mark.parametrize("text", ["", "It rained all week.", "Hello! Anna Berg sold a red bike." + CUE])
def test_other_texts_are_no_posts(text):
    assert read_post(text) is None


def test_values_have_several_words_or_digits():
    rng = Random(0)
    for fact in FACTS:
        assert len(draw_value(fact, rng).replace(" ", "")) > 2
        assert len({draw_value(fact, rng) for _ in range(200)}) > 40
    with pytest.raises(ValueError, match="'why' is not a fact; expected one of who, what"):
        draw_value("why", rng)
