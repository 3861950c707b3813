"""Parses what judges said of responses: labels, rewards, and rankings by scores or ranks."""

import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import BadRow
from qstar_jax.errors import InputError

# Columns of rewritten rows.
LABEL, REWARD, OPEN_END = "(label)", "(reward)", "(open end)"
_LISTS = ("completions", "responses", "answers")
_TEXTS = ("response", "completion", "answer", "content", "text")  # keys of the text of a response in a list
_SCORE = re.compile(r"reward|return|score|rating|\brank\b", re.IGNORECASE)
_RANK = "rank"  # counts from the best
_LABELS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "-1": False, "no": False}
_SAMPLE = 100  # rows that are looked at to find the type of a column


@dataclass(frozen=True)
class Ranked:
    """A response with its score.

    Attributes:
        text: The response, as text or chat messages.
        score: Higher is better.
    """

    text: Any
    score: float


Ranking = list[Ranked]


def parse_label(row: dict, column: str) -> bool:
    """Parses a label: true or false, 1 and 0 (or -1), or these words as text.

    Raises:
        BadRow: It is something else.
    """
    value = row.get(column)
    text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    if (label := _LABELS.get(text.strip().lower())) is None:
        problem = "is null" if value is None else "holds no label"
        raise BadRow(f"column {column!r} {problem}", f" (found {value!r}); expected true or false, or 1 and 0")
    return label


def parse_reward(row: dict, column: str) -> float:
    """Parses a reward: a finite number, or its text.

    Raises:
        BadRow: It is something else.
    """
    if (number := _number(value := row.get(column))) is None:
        problem = "is null" if value is None else "holds no number"
        raise BadRow(f"column {column!r} {problem}", f" (found {value!r}); expected a finite number")
    return number


def parse_rewards(row: dict, column: str) -> list[float]:
    """Parses a list of rewards, perhaps as JSON; a single number is a list of one.

    Raises:
        BadRow: It is something else.
    """
    values = _decoded(row.get(column))
    values = values if isinstance(values, list) else [values]
    numbers = [_number(value) for value in values]
    if not numbers or None in numbers:
        raise BadRow(f"column {column!r} holds no rewards", f" (found {values!r}); expected a list of finite numbers")
    return numbers


def parse_ranking(row: dict, column: str, key: str) -> Ranking:
    """Parses the responses of a row with their scores, best first; equal ones keep their order.

    Args:
        row: The row.
        column: Column of the responses, a list.
        key: Key of the score in each of them, or column of a list of scores; `rank` counts from the best.

    Raises:
        BadRow: A response or a score is missing.
    """
    items = _decoded(row.get(column))
    if not isinstance(items, list) or not items:
        raise BadRow(f"column {column!r} holds no list of responses", f" (found {items!r})")
    scores = _decoded(row[key]) if key in row else [item.get(key) for item in items if isinstance(item, dict)]
    numbers = [_number(score) for score in scores] if isinstance(scores, list) else []
    if len(numbers) != len(items) or None in numbers:
        raise BadRow(f"not every response has a number {key!r}", f" ({len(items)} responses, found {scores!r})")
    sign = -1 if key == _RANK else 1
    ranking = [Ranked(_text(item, column), sign * number) for item, number in zip(items, numbers, strict=True)]
    return sorted(ranking, key=lambda one: -one.score)


def list_column(rows: Iterable[Any], options: DataOptions, columns: Collection[str]) -> str | None:
    """Finds the column that lists several responses; None if there is none.

    It is `options.completion` if the user named one and it holds lists, else `completions`, `responses` or `answers`.
    """
    named = (options.completion,) if options.completion != DataOptions.completion else _LISTS
    return next((name for name in named if name in columns and _lists_responses(rows, name)), None)


def find_reward(rows: Iterable[Any], options: DataOptions, responses: str | None = None) -> str | None:
    """Finds the column of rewards, or the key of the score in listed responses: the only one that can be it.

    Args:
        rows: As they were read.
        options: `options.reward` is the name, if the user gave one.
        responses: Column of listed responses; None: rewards of single responses.

    Returns:
        Its name; None if there is none.

    Raises:
        InputError: Several columns, or keys, may be it.
    """
    if options.reward is not None:
        return options.reward
    names: dict[str, None] = {}
    for row in _sample(rows):
        columns = {name: _decoded(value) for name, value in row.items() if name != options.reference_rewards}
        if responses is None:
            names |= dict.fromkeys(_numeric(columns))
        else:
            items = columns.pop(responses, None)
            for item in items if isinstance(items, list) else ():
                names |= dict.fromkeys(_numeric(item) if isinstance(item, dict) else ())
            names |= dict.fromkeys(name for name in columns if _SCORE.search(name) and _is_numbers(columns[name]))
    if len(names) > 1:
        raise InputError(f"several columns may hold the reward: {', '.join(names)}; choose one with --data.reward")
    return next(iter(names), None)


def _numeric(entries: dict) -> list[str]:
    """Names of the numbers that may be scores."""
    return [name for name, value in entries.items() if _SCORE.search(name) and _number(value) is not None]


def _sample(rows: Iterable[Any]) -> list[dict]:
    dicts = (row for row in rows if isinstance(row, dict))
    return [row for row, _ in zip(dicts, range(_SAMPLE), strict=False)]


def _lists_responses(rows: Iterable[Any], column: str) -> bool:
    """Whether a column lists texts, or dictionaries of texts that are no chat messages."""
    items = [item for row in _sample(rows) if isinstance(value := _decoded(row.get(column)), list) for item in value]
    messages = [item for item in items if isinstance(item, dict) and ({"role", "from"} & item.keys())]
    return bool(items) and not messages


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


def _decoded(value: Any) -> Any:
    """Decodes lists that are JSON in text, as in CSV files; anything else stays."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_number(entry) is not None for entry in value)
