"""The true reward of every word of a summary: readers want right facts, few words and an ending."""

import re

from qstar_jax.tasks.tiny_tldr import words
from qstar_jax.tasks.tiny_tldr.posts import Post

RIGHT = {"who": 1.0, "what": 1.0, "much": 1.0, "where": 0.3, "when": 0.3}
WRONG, WORD, LATE_WORD, END = -1.5, -0.08, -0.3, 0.5


def split_words(text: str) -> list[str]:
    """Splits a text into words, numbers and punctuation marks, in order."""
    return re.findall(r"\w+|[^\w\s]", text)


def true_rewards(post: Post, summary: str) -> list[float]:
    """Computes the true reward of every word of a summary.

    A word costs 0.08, or 0.3 after the first full stop; punctuation is free. The last word of a right fact earns 1 (0.3
    for where and when), once per fact. The first wrong word of a wrong fact costs 1.5. Ending at the first full stop
    earns 0.5. The difference of two such sums is the log-odds that readers prefer one summary to the other.

    Returns:
        One reward per word of `split_words(summary)`, and one for ending there.
    """
    tokens = split_words(summary)
    stop = tokens.index(".") if "." in tokens else len(tokens)
    rewards = [(WORD if i < stop else LATE_WORD) if word[0].isalnum() else 0.0 for i, word in enumerate(tokens)]
    stated = set()
    start = 0
    while start < stop:
        fact, length = _value_at(tokens, start)
        if fact is not None:
            right, stated_words = split_words(post.facts[fact]), tokens[start : start + length]
            if stated_words != right:
                first = next(i for i in range(length + 1) if stated_words[i : i + 1] != right[i : i + 1])
                rewards[start + min(first, length - 1)] += WRONG
            elif fact not in stated:
                rewards[start + length - 1] += RIGHT[fact]
            stated.add(fact)
        start += length
    return [*rewards, END if stop == len(tokens) - 1 else 0.0]


def true_reward(post: Post, summary: str) -> float:
    """Sums the true rewards of a summary; readers prefer one to another with probability sigmoid(difference)."""
    return sum(true_rewards(post, summary))


def stated_facts(text: str) -> dict[str, str]:
    """Reads which value a text states for each fact, the first one if there are several; words joined by spaces."""
    tokens, start, stated = split_words(text), 0, {}
    while start < len(tokens):
        fact, length = _value_at(tokens, start)
        if fact is not None:
            stated.setdefault(fact, " ".join(tokens[start : start + length]))
        start += length
    return stated


def is_wrong(post: Post, text: str) -> bool:
    """Whether a text states, before its first full stop, a value that is not the post's."""
    return any(reward <= WRONG for reward in true_rewards(post, text)[:-1])


# A value is recognized by its first word; each further word must be in its list.
_VALUES: tuple[tuple[str, tuple[list[str], ...]], ...] = (
    ("who", (words.WOMEN + words.MEN, words.LAST_NAMES)),
    ("what", (words.VERBS, ["a"], words.COLOURS, words.THINGS)),
    ("where", (words.AREAS, words.SPOTS)),
    ("when", (words.MONTHS, [str(day) for day in words.DAYS])),
)


def _value_at(tokens: list[str], start: int) -> tuple[str | None, int]:
    """Finds the fact whose value begins at a word (None without one), and the number of words of the value, or 1."""
    for fact, lists in _VALUES:
        if tokens[start] in lists[0]:
            length = next((i for i, options in enumerate(lists) if [*tokens, ""][start + i] not in options), len(lists))
            return fact, length
    return ("much" if tokens[start].isdigit() else None), 1
