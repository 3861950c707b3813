import math
import re
from random import Random

import pytest

from qstar_jax.tasks.tiny_tldr.posts import FACTS, FILLERS, PREAMBLES, make_post
from qstar_jax.tasks.tiny_tldr.rewards import true_reward
from qstar_jax.tasks.tiny_tldr.summaries import (
    EMPTY,
    EXTRAS,
    FORMS,
    FROM_POST,
    RIGHT,
    RUN_ON,
    draw_form,
    draw_sentence,
    draw_summary,
    fill,
    invent,
    run_on,
)

WHERE, WHEN = r"[A-Z]\w+ [A-Z]\w+", r"[A-Z]\w+ \d\d"
OPENINGS = "|".join(f" {preamble}" for preamble in PREAMBLES)
SUMMARY = re.compile(
    rf"(?: On (?P<when_first>{WHEN}),| At (?P<where_first>{WHERE}),|(?P<preamble>{OPENINGS}))?"
    rf" (?P<who>[A-Z]\w+ [A-Z]\w+)(?P<adverb>{'|'.join(EXTRAS['adverb'])})? (?P<what>\w+ a \w+ \w+)"
    rf"(?: at (?P<where>{WHERE}))?(?: on (?P<when>{WHEN}))?"
    rf"(?: for(?P<about>{'|'.join(EXTRAS['about'])})? (?P<much>\d\d\d) dollars)?(?P<tail>{'|'.join(EXTRAS['tail'])})?\."
    rf"(?P<filler>{'|'.join(f' {re.escape(x)}' for x in FILLERS)})?"
)


def parse(summary):
    found = SUMMARY.fullmatch(summary)
    assert found, summary
    parts = found.groupdict()
    return parts | {fact: parts[fact] or parts[f"{fact}_first"] for fact in ("where", "when")}


@pytest.fixture(scope="module")
def drawn():
    """Posts, and the parts of one summary of each."""
    rng = Random(0)
    posts = [make_post(rng) for _ in range(10_000)]
    return [(post, parse(draw_summary(post, rng))) for post in posts]


def assert_share(hits, chance):
    hits = list(hits)
    assert len(hits) > 100
    assert sum(hits) / len(hits) == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / len(hits)))


def test_forms_are_a_distribution_and_are_drawn_from_it():
    assert sum(form.weight for form in FORMS) == pytest.approx(1)
    assert len({form.text for form in FORMS}) == len(FORMS)
    rng = Random(0)
    texts = [draw_form(rng).text for _ in range(20_000)]
    for form in FORMS:
        assert_share((text == form.text for text in texts), form.weight)


def test_each_opening_has_its_weight_and_leads_to_every_clause_that_adds_to_it():
    for opening, weight, count in (
        (" {who}", 0.15, 5),
        (" So", 0.5, 50),
        (" On {when},", 0.2, 3),
        (" At {where},", 0.15, 3),
    ):
        forms = [form for form in FORMS if form.text.startswith(opening)]
        assert (len(forms), sum(form.weight for form in forms)) == (count, pytest.approx(weight))


def test_sentences_of_the_language_show_no_habit():
    rng = Random(3)
    texts = [draw_sentence(rng).text for _ in range(10_000)]
    assert set(texts) == {form.text for form in FORMS}
    for opening in (" {who}", " So", " On {when},", " At {where},"):
        own = [text for text in texts if text.startswith(opening)]
        assert_share((text.startswith(opening) for text in texts), 0.25)
        clauses = [text[text.index(" {who}") :] for text in own]
        for clause in set(clauses):
            assert_share((other == clause for other in clauses), 1 / len(set(clauses)))


def test_a_form_states_facts_once_and_words_that_change_nothing_are_no_facts():
    for form in FORMS:
        assert len(form.facts) == len(set(form.facts)) and {"who", "what"} <= set(form.facts) <= set(FACTS)
        assert set(re.findall(r"\{(\w+)\}", form.text)) - set(form.facts) == {"adverb", "tail"} | (
            {"about"} if "much" in form.facts else set()
        )


def test_the_likeliest_opening_leads_to_answers_that_are_unlikely_each():
    so = [form.weight for form in FORMS if form.text.startswith(" So")]
    plain = [form.weight for form in FORMS if form.text.startswith(" {who}")]
    assert sum(so) > 0.49 > 3 * sum(plain) and max(so) < max(plain) / 2


def test_places_for_words_that_change_nothing_are_filled_each_on_its_own():
    rng = Random(1)
    facts = {"who": "Anna Berg", "what": "sold a red bike", "much": "340", "where": "Old Mill", "when": "May 14"}
    found = [parse(fill(FORMS[0], facts, rng)) for _ in range(10_000)]
    assert all(parts[fact] == facts[fact] for parts in found for fact in ("who", "what", "much"))
    for place, phrases in EXTRAS.items():
        assert_share((parts[place] is None for parts in found), EMPTY)
        for phrase in phrases:
            assert_share((parts[place] == phrase for parts in found), (1 - EMPTY) / len(phrases))
    assert_share((not any(parts[place] for place in EXTRAS) for parts in found), EMPTY**3)


def test_drawn_summaries_have_these_words_too_and_run_on_as_often_as_said(drawn):
    for place in EXTRAS:
        assert_share((parts[place] is None for _, parts in drawn if place != "about" or parts["much"]), EMPTY)
    for preamble in PREAMBLES:
        assert_share((parts["preamble"] == f" {preamble}" for _, parts in drawn), 0.5 / len(PREAMBLES))
    for filler in FILLERS:
        assert_share((parts["filler"] == f" {filler}" for _, parts in drawn), RUN_ON / len(FILLERS))


def test_writers_are_mostly_right_and_less_so_where_the_post_confuses(drawn):
    for fact, (confused, sure) in RIGHT.items():
        assert 0.5 < confused < sure
        right = {confused: [], sure: []}
        for post, parts in drawn:
            chance = confused if fact in post.distractors else sure
            right[chance] += [parts[fact] == post.facts[fact]] if parts[fact] else []
        for chance, hits in right.items():
            assert_share(hits, chance)


def test_most_mistakes_where_the_post_confuses_are_its_distractor(drawn):
    mistakes = [
        parts[fact] == post.distractors[fact]
        for post, parts in drawn
        for fact in post.distractors
        if parts[fact] and parts[fact] != post.facts[fact]
    ]
    assert_share(mistakes, FROM_POST)


def test_running_on_adds_a_sentence_that_says_nothing_and_costs():
    rng = Random(2)
    post = make_post(rng)
    longer = {run_on(" A.", rng) for _ in range(200)}
    assert longer == {f" A. {filler}" for filler in FILLERS}
    assert all(true_reward(post, text) < true_reward(post, " A.") - 1 for text in longer)


def test_invented_values_are_neither_right_nor_in_the_post():
    rng = Random(2)
    for _ in range(300):
        post = make_post(rng)
        for fact in RIGHT:
            assert invent(post, fact, rng) not in (post.facts[fact], post.distractors.get(fact))
