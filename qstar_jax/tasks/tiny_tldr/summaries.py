"""How people summarise posts: many good ways to say it, habits that readers do not share, and mistakes.

A summary is a form, drawn by its weight, whose facts are filled in one by one, mostly rightly. Two habits make greedy
decoding and search differ. Half of all summaries begin with "So", in any of ten ways, so the likeliest first word leads
to many answers that are unlikely each; and the plain form that says most in fewest words begins like a few others, each
with a smaller chance.
"""

import re
from dataclasses import dataclass
from random import Random

from qstar_jax.tasks.tiny_tldr import words
from qstar_jax.tasks.tiny_tldr.posts import FACTS, FILLERS, PREAMBLES, Post, draw_value


@dataclass(frozen=True)
class Form:
    """One way to word a summary.

    Attributes:
        weight: Probability that it is chosen.
        text: Its words, with `{fact}` for values.
    """

    weight: float
    text: str

    @property
    def facts(self) -> list[str]:
        """The facts that it states, in order."""
        return [sign for sign in re.findall(r"\{(\w+)\}", self.text) if sign in FACTS]


_PLAIN, _PREAMBLE, _WHEN_FIRST, _WHERE_FIRST = 0.15, 0.5, 0.2, 0.15  # how summaries begin
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
# Words that change nothing but the length, with the space before them; a place for one is left empty by this chance.
EXTRAS = {
    "adverb": tuple(f" {word}" for word in words.ADVERBS),
    "about": tuple(f" {word}" for word in words.PRICE_WORDS),
    "tail": tuple(f" {phrase}" for phrase in words.TAILS),
}
EMPTY = 0.4
# The chance that a writer gets a fact right where the post mentions a wrong value too, and where it does not.
RIGHT = {"who": (0.8, 0.96), "what": (0.7, 0.96), "much": (0.7, 0.94), "where": (0.6, 0.94), "when": (0.6, 0.94)}
FROM_POST = 0.85  # of the mistakes are that wrong value, where there is one; the others are invented
RUN_ON = 0.3  # of the summaries go on with a sentence that says nothing


def draw_form(rng: Random) -> Form:
    """Draws the wording of a summary.

    Args:
        rng: Where it comes from.

    Returns:
        One of `FORMS`.
    """
    return rng.choices(FORMS, [form.weight for form in FORMS])[0]


def draw_sentence(rng: Random) -> Form:
    """Draws the wording of a sentence of the language, in which nobody's habits show.

    Args:
        rng: Where it comes from.

    Returns:
        One of `FORMS`: each kind of opening is as likely as the other, and so is each clause that fits it.
    """
    opening = rng.choice(("", " " + rng.choice(PREAMBLES), " On {when},", " At {where},"))
    return rng.choice(_opened(opening, 1.0))


def draw_summary(post: Post, rng: Random) -> str:
    """Writes a summary as people do.

    Args:
        post: The post.
        rng: Draws its wording, its mistakes and whether it runs on.

    Returns:
        The summary, with the space before its first word.
    """
    text = fill(draw_form(rng), {fact: _stated(post, fact, rng) for fact in FACTS}, rng)
    return run_on(text, rng) if rng.random() < RUN_ON else text


def fill(form: Form, facts: dict[str, str], rng: Random) -> str:
    """Words a form.

    Args:
        form: The form.
        facts: The value of each fact.
        rng: Draws the words that change nothing.

    Returns:
        The summary.
    """
    extras = {sign: rng.choice(phrases) if rng.random() >= EMPTY else "" for sign, phrases in EXTRAS.items()}
    return form.text.format(**facts, **extras)


def run_on(summary: str, rng: Random) -> str:
    """Lets a summary go on with a sentence that says nothing.

    Args:
        summary: A summary that ends with a full stop.
        rng: Draws the sentence.

    Returns:
        The longer summary.
    """
    return f"{summary} {rng.choice(FILLERS)}"


def invent(post: Post, fact: str, rng: Random) -> str:
    """Draws a value that the post does not give to a fact.

    Args:
        post: The post.
        fact: One of `posts.FACTS`.
        rng: Where it comes from.

    Returns:
        Neither the right value nor the distractor.
    """
    while (value := draw_value(fact, rng)) in (post.facts[fact], post.distractors.get(fact)):
        pass
    return value


def _stated(post: Post, fact: str, rng: Random) -> str:
    confusing = fact in post.distractors
    if rng.random() < RIGHT[fact][not confusing]:
        return post.facts[fact]
    return post.distractors[fact] if confusing and rng.random() < FROM_POST else invent(post, fact, rng)
