"""Parses what judges said of responses: labels and rewards."""

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import BadRow
from qstar_jax.errors import InputError

# Columns of rewritten rows; the turns that a single response shares with the other one of its pair are its prompt.
LABEL, REWARD, OPEN_END, OTHER = "(label)", "(reward)", "(open end)", "(other)"
_SCORE = re.compile(r"reward|return|score|rating|\brank\b", re.IGNORECASE)
_LABELS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "-1": False, "no": False}
_SAMPLE = 100  # rows
_LARGEST = float(np.finfo(np.float32).max)  # training computes in float32, where more is infinite
_NUMBER = f"a number from {-_LARGEST:.1e} to {_LARGEST:.1e}"


def parse_label(row: dict, column: str) -> bool:
    """Parses a label: true or false, 1 and 0 (or -1), or these words as text.

    Raises:
        BadRow: It is something else.
    """
    value = row.get(column)
    text = str(value) if (parsed := number(value)) is None else f"{parsed:.17g}"
    if (label := _LABELS.get(text.strip().lower())) is None:
        problem = "is null" if value is None else "holds no label"
        raise BadRow(f"column {column!r} {problem}", f" (found {value!r}); expected true or false, or 1 and 0")
    return label


def parse_reward(row: dict, column: str) -> float:
    """Parses a reward: a number that float32 holds, or its text.

    Raises:
        BadRow: It is something else.
    """
    if (reward := number(value := nested(row, column))) is None:
        problem = "is null" if value is None else "holds no number"
        raise BadRow(f"column {column!r} {problem}", f" (found {value!r}); expected {_NUMBER}")
    return reward


def parse_rewards(row: dict, column: str) -> list[float]:
    """Parses a list of rewards, perhaps as JSON; a single number is a list of one.

    Raises:
        BadRow: It is something else.
    """
    values = decoded(row.get(column))
    values = values if isinstance(values, list) else [values]
    numbers = [number(value) for value in values]
    if not numbers or None in numbers:
        raise BadRow(f"column {column!r} holds no rewards", f" (found {values!r}); expected a list, each {_NUMBER}")
    return numbers


def find_reward(rows: Iterable[Any], options: DataOptions, responses: str | None = None) -> str | None:
    """Finds the column of rewards, or the key of the score in listed responses: the only one that can be it.

    Numbers in nested dictionaries, whose names are joined by dots, are looked at only if there are no others.

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
    for row in sample(rows):
        columns = {name: decoded(value) for name, value in row.items() if name != options.reference_rewards}
        if responses is None:
            names |= dict.fromkeys(_numeric(columns))
        else:
            items = columns.pop(responses, None)
            for item in items if isinstance(items, list) else ():
                names |= dict.fromkeys(_numeric(item))
            names |= dict.fromkeys(name for name in columns if _SCORE.search(name) and _is_numbers(columns[name]))
    top = [name for name in names if "." not in name] or list(names)
    if len(top) > 1:
        raise InputError(f"several columns may hold the reward: {', '.join(names)}; choose one with --data.reward")
    return next(iter(top), None)


def nested(entries: Any, key: str) -> Any:
    """Returns the value of a key, whose dots lead into nested dictionaries; None if there is none."""
    if not isinstance(entries, dict) or key in entries:
        return entries.get(key) if isinstance(entries, dict) else None
    name, _, rest = key.partition(".")
    return nested(entries.get(name), rest) if rest else None


def sample(rows: Iterable[Any]) -> list[dict]:
    """Returns the first rows of a file, enough to find the type of a column."""
    dicts = (row for row in rows if isinstance(row, dict))
    return [row for row, _ in zip(dicts, range(_SAMPLE), strict=False)]


def decoded(value: Any) -> Any:
    """Decodes lists that are JSON in text, as in CSV files; anything else stays."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def number(value: Any) -> float | None:
    """Returns a number that float32 holds, perhaps from its text; None if it is something else, NaN or infinite."""
    if not isinstance(value, int | float | str):
        return None
    try:
        parsed = float(value)
    except (ValueError, OverflowError):
        return None
    return parsed if abs(parsed) <= _LARGEST else None  # NaN is not


def whole_number(value: Any) -> int | None:
    """Returns a whole number, perhaps from its text or a float, as tables hold it; None if it is something else."""
    parsed = None if isinstance(value, bool) else number(value)
    return int(parsed) if parsed is not None and parsed.is_integer() else None


def _numeric(entries: Any) -> list[str]:
    """Names of the numbers that may be scores; those in nested dictionaries are joined by dots."""
    names = []
    for name, value in entries.items() if isinstance(entries, dict) else ():
        if isinstance(value, dict):
            names += [f"{name}.{inner}" for inner in _numeric(value)]
        elif _SCORE.search(name) and (number(value) is not None or _is_too_large(value)):
            names.append(name)
    return names


def _is_too_large(value: Any) -> bool:
    """Whether it is a number, but none that float32 holds: a reward that cannot be used, but no other column."""
    return isinstance(value, int | float) and number(value) is None


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(number(entry) is not None for entry in value)
