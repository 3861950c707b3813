"""Parses several responses to one prompt with their scores, and makes pairs and rankings of them."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import BadRow, DroppedRow
from qstar_jax.data.outcomes import decoded, nested, number, sample

IGNORED_SYSTEM = "(ignored system)"  # column of rewritten rows: keys of system prompts that are not read
SYSTEM_KEYS = frozenset(("custom_system_prompt", "system_prompt", "system"))
_LISTS = ("completions", "responses", "answers")
_TEXTS = ("response", "completion", "answer", "content", "text")  # keys of the text of a response in a list
_RANK = "rank"  # counts from the best
_UNRATED = ("n/a", "na")


@dataclass(frozen=True)
class Ranked:
    """A response with its score.

    Attributes:
        text: The response, as text or chat messages.
        score: Higher is better.
        system: The system prompt that it was given; None if it had none of its own, or it is not read.
    """

    text: Any
    score: float
    system: str | None = None


Ranking = list[Ranked]


def parse_ranking(row: dict, column: str, key: str, system: str | None = None) -> Ranking:
    """Parses the responses of a row with their scores, best first; equal ones keep their order.

    Args:
        row: The row.
        column: Column of the responses, a list.
        key: Key of the score in each of them (dots lead into nested ones), or column of a list of scores; `rank` counts
            from the best.
        system: Key of the system prompt in each of them, if it is read.

    Raises:
        BadRow: A response or a score is missing.
        DroppedRow: A response was not rated.
    """
    items = decoded(row.get(column))
    if not isinstance(items, list) or not items:
        raise BadRow(f"column {column!r} holds no list of responses", f" (found {items!r})")
    scores = decoded(row[key]) if key in row else [nested(item, key) for item in items if isinstance(item, dict)]
    if isinstance(scores, list) and any(str(score).strip().lower() in _UNRATED for score in scores):
        raise DroppedRow(f"a response without a rating in {key!r}")
    numbers = [number(score) for score in scores] if isinstance(scores, list) else []
    if len(numbers) != len(items) or None in numbers:
        raise BadRow(f"not every response has a number {key!r}", f" ({len(items)} responses, found {scores!r})")
    sign = -1 if key.rpartition(".")[2] == _RANK else 1
    ranking = [
        Ranked(_text(item, column), sign * score, item.get(system) if isinstance(item, dict) else None)
        for item, score in zip(items, numbers, strict=True)
    ]
    return sorted(ranking, key=lambda one: -one.score)


def list_column(rows: Iterable[Any], options: DataOptions, columns: Collection[str]) -> str | None:
    """Finds the column that lists several responses; None if there is none.

    It is `options.completion` if the user named one and it holds lists, else `completions`, `responses` or `answers`.
    """
    names = (options.completion,) if options.completion != DataOptions.completion else _LISTS
    return next((name for name in names if name in columns and _lists_responses(rows, name)), None)


def keys_of_responses(rows: Iterable[Any], column: str) -> set[str]:
    """Names the keys that listed responses have, with a value."""
    return {key for item in _items(rows, column) if isinstance(item, dict) for key, value in item.items() if value}


def by_system(ranking: Ranking) -> dict[str | None, Ranking]:
    """Splits a ranking into those of each system prompt: responses to different prompts cannot be compared."""
    parts: dict[str | None, Ranking] = {}
    for one in ranking:
        parts.setdefault(one.system, []).append(one)
    return parts


def comparable(rankings: list[tuple[dict, Ranking]]) -> list[tuple[dict, Ranking]]:
    """Returns the rankings, each with its row, whose scores differ.

    Raises:
        DroppedRow: There are none.
    """
    different = [(row, ranking) for row, ranking in rankings if ranking[0].score > ranking[-1].score]
    if not different and len(rankings) > 1:
        raise DroppedRow("no two responses of different scores have the same system prompt")
    if not different:
        raise DroppedRow("all responses have the same score")
    return different


def without_ties(ranking: Ranking) -> Ranking:
    """Returns a ranking with the first response of each score."""
    return [
        one for one, before in zip(ranking, [None, *ranking], strict=False) if not before or before.score > one.score
    ]


def pairs_by_rule(ranking: Ranking, rule: str, index: int) -> list[tuple[Any, Any]]:
    """Makes pairs of responses of different scores from a ranking.

    Args:
        ranking: Responses with their scores, which are not all equal, best first.
        rule: `best_worst`, `best_random` (the best and any worse one), or `all`.
        index: Index of the row, which decides what is random.
    """
    best, worst = ranking[0], ranking[-1]
    if rule == "all":
        return [(a.text, b.text) for a, b in combinations(ranking, 2) if a.score > b.score]
    if rule == "best_random":
        worse = [one for one in ranking if one.score < best.score]
        # Raw Philox words are the same in every version of numpy.
        worst = worse[int(np.random.Philox(key=index).random_raw()) % len(worse)]
    return [(best.text, worst.text)]


def _items(rows: Iterable[Any], column: str) -> list:
    return [item for row in sample(rows) if isinstance(value := decoded(row.get(column)), list) for item in value]


def _lists_responses(rows: Iterable[Any], column: str) -> bool:
    """Whether a column lists texts, or dictionaries of texts that are no chat messages."""
    items = _items(rows, column)
    return bool(items) and not any(isinstance(item, dict) and ({"role", "from"} & item.keys()) for item in items)


def _text(item: Any, column: str) -> Any:
    if not isinstance(item, dict):
        return item
    key = next((name for name in _TEXTS if item.get(name) is not None), None)
    if key is None:
        raise BadRow(
            f"column {column!r} has a response without text",
            f" (keys: {', '.join(map(repr, item)) or 'none'}); expected one of {', '.join(_TEXTS)}",
        )
    return item[key]
