"""The writers of summaries: many good wordings, habits that readers do not share, and mistakes.

A summary is a form, drawn by weight, whose facts are filled in independently and mostly right. Two habits separate
greedy decoding from search. Half of all summaries begin with "So", in one of ten ways, so the most likely first word
leads to many responses of low probability. And the plain form, which says the most in the fewest words, shares its
beginning with a few others that are less likely.
"""

import re
from dataclasses import dataclass
from random import Random

from qstar_jax.tasks.tiny_tldr import words
from qstar_jax.tasks.tiny_tldr.posts import FACTS, FILLERS, PREAMBLES, Post, draw_value


@dataclass(frozen=True)
class Form:
    """A wording of a summary.

    Attributes:
        weight: Probability of the form.
        text: Its words, with placeholders `{fact}`.
    """

    weight: float
    text: str

    @property
    def facts(self) -> list[str]:
        """The facts that the form states, in order."""
        return [sign for sign in re.findall(r"\{(\w+)\}", self.text) if sign in FACTS]


_PLAIN, _PREAMBLE, _WHEN_FIRST, _WHERE_FIRST = 0.15, 0.5, 0.2, 0.15  # probabilities of the beginnings
_CLAUSES = (
    Form(0.50, " {who}{adverb} {what} for{about} {much} dollars{tail}."),
    Form(0.10, " {who}{adverb} {what}{tail}."),
    Form(0.15, " {who}{adverb} {what} at {where} for{about} {much} dollars{tail}."),
    Form(0.15, " {who}{adverb} {what} on {when} for{about} {much} dollars{tail}."),
    Form(0.10, " {who}{adverb} {what} at {where} on {when} for{about} {much} dollars{tail}."),
)


def _opened(opening: str, weight: float) -> list[Form]:
    stated = Form(weight, opening).facts
    clauses = [clause for clause in _CLAUSES if not set(stated) & set(clause.facts)]
    total = sum(clause.weight for clause in clauses)
    return [Form(weight * clause.weight / total, opening + clause.text) for clause in clauses]


FORMS: tuple[Form, ...] = (
    *_opened("", _PLAIN),
    *(form for preamble in PREAMBLES for form in _opened(" " + preamble, _PREAMBLE / len(PREAMBLES))),
    *_opened(" On {when},", _WHEN_FIRST),
    *_opened(" At {where},", _WHERE_FIRST),
)
# Optional words that only change the length, with a space before them, and the probability of leaving them out.
EXTRAS = {
    "adverb": tuple(f" {word}" for word in words.ADVERBS),
    "about": tuple(f" {word}" for word in words.PRICE_WORDS),
    "tail": tuple(f" {phrase}" for phrase in words.TAILS),
}
EMPTY = 0.4
# Probability of getting a fact right where the post also mentions a wrong value, and where it does not.
RIGHT = {"who": (0.8, 0.96), "what": (0.7, 0.96), "much": (0.7, 0.94), "where": (0.6, 0.94), "when": (0.6, 0.94)}
FROM_POST = 0.85  # share of mistakes that take the wrong value from the post, if it has one; others are invented
RUN_ON = 0.3  # share of summaries that run on with a filler sentence


def draw_form(rng: Random) -> Form:
    """Draws the wording of a summary, one of `FORMS`."""
    return rng.choices(FORMS, [form.weight for form in FORMS])[0]


def draw_sentence(rng: Random) -> Form:
    """Draws the wording of a sentence without the habits of the writers.

    It is one of `FORMS`, with all kinds of opening equally likely, and all clauses that fit it.
    """
    opening = rng.choice(("", " " + rng.choice(PREAMBLES), " On {when},", " At {where},"))
    return rng.choice(_opened(opening, 1.0))


def draw_summary(post: Post, rng: Random) -> str:
    """Draws a summary with a leading space: its wording, its mistakes, and whether it runs on."""
    text = fill(draw_form(rng), {fact: _stated(post, fact, rng) for fact in FACTS}, rng)
    return run_on(text, rng) if rng.random() < RUN_ON else text


def fill(form: Form, facts: dict[str, str], rng: Random) -> str:
    """Fills in a form."""
    extras = {sign: rng.choice(phrases) if rng.random() >= EMPTY else "" for sign, phrases in EXTRAS.items()}
    return form.text.format(**facts, **extras)


def run_on(summary: str, rng: Random) -> str:
    """Appends a filler sentence to a summary."""
    return f"{summary} {rng.choice(FILLERS)}"


def invent(post: Post, fact: str, rng: Random) -> str:
    """Draws a value of a fact that is neither the right one nor the distractor of the post."""
    while (value := draw_value(fact, rng)) in (post.facts[fact], post.distractors.get(fact)):
        pass
    return value


def _stated(post: Post, fact: str, rng: Random) -> str:
    confusing = fact in post.distractors
    if rng.random() < RIGHT[fact][not confusing]:
        return post.facts[fact]
    return post.distractors[fact] if confusing and rng.random() < FROM_POST else invent(post, fact, rng)
