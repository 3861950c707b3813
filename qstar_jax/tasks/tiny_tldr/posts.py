"""Posts: short stories that state five facts among distractors, each a pure function of its random generator."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from qstar_jax.tasks.tiny_tldr import words

FACTS = ("who", "what", "much", "where", "when")
CUE = "\nTL;DR:"
PREAMBLES = (
    "So, as far as I know,",
    "So, in the end,",
    "So, long story short,",
    "So it seems that",
    "So the story is that",
    "So what happened is that",
    "So, in a few words,",
    "So I read that",
    "So they say that",
    "So, believe it or not,",
)

# Sentences that state each fact: forms that also mention a wrong value, and forms that do not. `{where}` is the right
# value and `{where2}` a wrong one; `{she}` is the main person, `{other}` someone else.
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "what": (
        (
            "{who} kept the {thing2} and {adverb}{verb} a {thing}{tail}.",
            "{other} {verb2} a {thing2}, but {who} {adverb}{verb} a {thing}{tail}.",
            "{who} {adverb}{verb} a {thing}, and {other} {verb2} a {thing2}{tail}.",
        ),
        ("{who} {adverb}{verb} a {thing}{tail}.", "{who} says that {she} {adverb}{verb} a {thing}{tail}."),
    ),
    "where": (
        (
            "It was at {where}, not at {where2}.",
            "They met at {where2} and went on to {where}.",
            "{other} was at {where2}, but {she} was at {where}.",
        ),
        ("It was at {where}.",),
    ),
    "when": (
        (
            "It was on {when}, not on {when2}.",
            "It was planned for {when2} and done on {when}.",
            "It was done on {when}, though {she} had said {when2}.",
        ),
        ("It was on {when}.",),
    ),
    "much": (
        (
            "The price was {about}{much} dollars, not {much2}.",
            "{other} said {much2} dollars, but {about}{much} were paid.",
            "They agreed on {about}{much} dollars, though it was worth {much2}.",
        ),
        ("The price was {about}{much} dollars.",),
    ),
}
GREETINGS = ("Hello!", "Listen.", "News:")
EXTRAS = {
    "adverb": [f"{word} " for word in words.ADVERBS],
    "about": [f"{word} " for word in words.PRICE_WORDS],
    "tail": [f" {phrase}" for phrase in words.TAILS],
}
FILLERS = ("It rained all week.", "It is a long story.", "I hope this helps.", "What do you think?")
_CONFUSING, _WITH_PREAMBLE = 0.75, 0.25  # probabilities: a sentence also mentions a wrong value; a post has a preamble
_WORDY = 0.4  # probability that a place for an optional word has one
_DISTRACTORS = {"who": "{other}", "what": "{thing2}", "much": "{much2}", "where": "{where2}", "when": "{when2}"}


@dataclass(frozen=True)
class Post:
    """A post and what is known about it.

    Attributes:
        text: The post, without the cue.
        facts: The right value of each of `FACTS`.
        distractors: The wrong value that the post mentions, for the facts that have one.
        names: Text of each placeholder in `FORMS`.
    """

    text: str
    facts: dict[str, str]
    distractors: dict[str, str]
    names: dict[str, str]

    @property
    def prompt(self) -> str:
        """The post, and the cue that asks for its summary."""
        return self.text + CUE


def make_post(rng: Random) -> Post:
    """Draws a post: what happened, then the other facts in any order, and perhaps a filler sentence."""
    # Draw the names, then a sentence per fact, with or without a distractor.
    names = _draw_names(rng)
    sentences = {fact: rng.choice(forms[rng.random() >= _CONFUSING]) for fact, forms in FORMS.items()}
    rest = [sentences[fact] for fact in ("where", "when", "much")] + rng.sample(FILLERS, rng.randrange(2))
    rng.shuffle(rest)
    # A distractor counts only if a sentence mentions it.
    opening = rng.choice(PREAMBLES if rng.random() < _WITH_PREAMBLE else GREETINGS)
    story = " ".join([opening, sentences["what"], *rest])
    return Post(
        text=story.format(**names),
        facts={fact: names[fact] for fact in FACTS},
        distractors={fact: names[fact + "2"] for fact, sign in _DISTRACTORS.items() if sign in story},
        names=names,
    )


def read_post(text: str) -> Post | None:
    """Reads the post that `make_post` drew back from its text; None if the text is not a post."""
    text = text.removesuffix(CUE)
    names: dict[str, str] = {}
    for forms in _PATTERNS.values():
        match = next((match for form in forms if (match := form.search(text))), None)
        if match is None:
            return None
        names |= match.groupdict()
    names |= {"what": f"{names['verb']} a {names['thing']}", "who2": names.get("other", "")}
    names |= {"what2": f"{names['verb']} a {names['thing2']}"} if "thing2" in names else {}
    wrong = {fact: names[fact + "2"] for fact in FACTS if names.get(fact + "2")}
    return Post(text, {fact: names[fact] for fact in FACTS}, wrong, names)


def draw_value(fact: str, rng: Random) -> str:
    """Draws a value of a fact.

    Args:
        fact: One of `FACTS`.
        rng: Random generator.

    Returns:
        For example "Anna Berg", "sold a red bike", "340", "Old Mill" or "May 14".

    Raises:
        ValueError: If there is no such fact.
    """
    match fact:
        case "who":
            return f"{rng.choice(words.WOMEN + words.MEN)} {rng.choice(words.LAST_NAMES)}"
        case "what":
            return f"{rng.choice(words.VERBS)} a {_draw_thing(rng)}"
        case "much":
            return str(rng.choice(words.AMOUNTS))
        case "where":
            return f"{rng.choice(words.AREAS)} {rng.choice(words.SPOTS)}"
        case "when":
            return f"{rng.choice(words.MONTHS)} {rng.choice(words.DAYS)}"
    raise ValueError(f"{fact!r} is not a fact; expected one of {', '.join(FACTS)}")


def _patterns() -> dict[str, list[re.Pattern]]:
    """Compiles the sentences of each fact to patterns; those with a distractor come first, since they capture more."""
    lists = {
        "name": (words.WOMEN + words.MEN, words.LAST_NAMES),
        "verb": (words.VERBS,),
        "thing": (words.COLOURS, words.THINGS),
        "where": (words.AREAS, words.SPOTS),
        "when": (words.MONTHS, [str(day) for day in words.DAYS]),
    }
    values = {name: " ".join(f"(?:{'|'.join(part)})" for part in parts) for name, parts in lists.items()}
    values |= {name + "2": values[name] for name in ("verb", "thing", "where", "when")}
    values |= {sign: f"(?:{'|'.join(phrases)})?" for sign, phrases in EXTRAS.items()}
    values |= {"who": values["name"], "other": values["name"], "she": "she|he", "much": r"\d+", "much2": r"\d+"}

    def pattern(form: str) -> re.Pattern:
        signs = re.split(r"\{(\w+)\}", form)
        parts = [f"(?P<{sign}>{values[sign]})" if i % 2 else re.escape(sign) for i, sign in enumerate(signs)]
        return re.compile(r"(?:(?<=[.?!:,] )|(?<=that ))" + "".join(parts))

    return {fact: [pattern(form) for form in (*confusing, *plain)] for fact, (confusing, plain) in FORMS.items()}


_PATTERNS = _patterns()


def _draw_thing(rng: Random) -> str:
    return f"{rng.choice(words.COLOURS)} {rng.choice(words.THINGS)}"


def _draw_names(rng: Random) -> dict[str, str]:
    names: dict[str, str] = {}
    for fact in ("much", "where", "when"):
        names[fact] = draw_value(fact, rng)
        names[fact + "2"] = _another(names[fact], lambda fact=fact: draw_value(fact, rng))
    woman = rng.random() < 0.5
    first, last = rng.sample(words.WOMEN if woman else words.MEN, 2), rng.sample(words.LAST_NAMES, 2)
    verb, thing = rng.choice(words.VERBS), _draw_thing(rng)
    thing2 = _another(thing, lambda: _draw_thing(rng))
    optional = {sign: rng.choice(values) if rng.random() < _WORDY else "" for sign, values in EXTRAS.items()}
    return (
        names
        | optional
        | {
            "who": f"{first[0]} {last[0]}",
            "who2": f"{first[1]} {last[1]}",
            "other": f"{first[1]} {last[1]}",
            "she": "she" if woman else "he",
            "what": f"{verb} a {thing}",
            "what2": f"{verb} a {thing2}",
            "verb": verb,
            "verb2": rng.choice(words.VERBS),
            "thing": thing,
            "thing2": thing2,
        }
    )


def _another(value: str, draw: Callable[[], str]) -> str:
    while (other := draw()) == value:
        pass
    return other
