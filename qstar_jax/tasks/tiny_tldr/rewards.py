"""What readers want of a summary, word by word: right facts, few words, an end."""

import re

from qstar_jax.tasks.tiny_tldr import words
from qstar_jax.tasks.tiny_tldr.posts import Post

RIGHT = {"who": 1.0, "what": 1.0, "much": 1.0, "where": 0.3, "when": 0.3}
WRONG, WORD, LATE_WORD, END = -1.5, -0.08, -0.3, 0.5


def split_words(text: str) -> list[str]:
    """Cuts a text into words, numbers and punctuation marks.

    Args:
        text: Any text.

    Returns:
        What is neither space nor line break, in order.
    """
    return re.findall(r"\w+|[^\w\s]", text)


def true_rewards(post: Post, summary: str) -> list[float]:
    """Gives every word of a summary its true reward.

    A word costs 0.08, and 0.3 behind the first full stop; punctuation is free. The last word of a right fact gets 1, or
    0.3 where it says where or when, once. The first wrong word of a wrong fact gets -1.5. Ending right behind the first
    full stop gets 0.5. Differences of such sums are the log-odds by which readers prefer one summary to another.

    Args:
        post: The post.
        summary: Any text.

    Returns:
        One reward for each of `split_words(summary)`, and a last one for ending there.
    """
    said = split_words(summary)
    stop = said.index(".") if "." in said else len(said)
    rewards = [(WORD if i < stop else LATE_WORD) if word[0].isalnum() else 0.0 for i, word in enumerate(said)]
    stated = set()
    start = 0
    while start < stop:
        fact, length = _value_at(said, start)
        if fact is not None:
            right, found = split_words(post.facts[fact]), said[start : start + length]
            if found != right:
                wrong = next(i for i in range(length + 1) if found[i : i + 1] != right[i : i + 1])
                rewards[start + min(wrong, length - 1)] += WRONG
            elif fact not in stated:
                rewards[start + length - 1] += RIGHT[fact]
            stated.add(fact)
        start += length
    return [*rewards, END if stop == len(said) - 1 else 0.0]


def true_reward(post: Post, summary: str) -> float:
    """Sums the true rewards of a summary.

    Args:
        post: The post.
        summary: Any text.

    Returns:
        The sum: readers prefer one summary to another with probability sigmoid(difference of sums).
    """
    return sum(true_rewards(post, summary))


# A value is recognised by its first word; each further word must be one of a list to belong to it.
_VALUES: tuple[tuple[str, tuple[list[str], ...]], ...] = (
    ("who", (words.WOMEN + words.MEN, words.LAST_NAMES)),
    ("what", (words.VERBS, ["a"], words.COLOURS, words.THINGS)),
    ("where", (words.AREAS, words.SPOTS)),
    ("when", (words.MONTHS, [str(day) for day in words.DAYS])),
)


def _value_at(said: list[str], start: int) -> tuple[str | None, int]:
    """The fact whose value begins at a word, if any, and how many words belong to it (1 if none)."""
    for fact, lists in _VALUES:
        if said[start] in lists[0]:
            length = next((i for i, known in enumerate(lists) if [*said, ""][start + i] not in known), len(lists))
            return fact, length
    return ("much" if said[start].isdigit() else None), 1
