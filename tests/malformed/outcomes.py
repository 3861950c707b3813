"""Malformed rewards, labels, right answers and first wrong steps in files of rows."""

import json
from functools import partial
from random import Random

from case import Case, Place

_ROW = {"prompt": "w1 w2", "completion": "w3 # 4"}
_NO_NUMBERS = {
    "NaN": "NaN",
    "infinite": "Infinity",
    "infinite below 0": "-Infinity",
    "more than any float": "1e999",
    "more than float32 holds": "1e39",
    "a number of 400 digits": "9" * 400,
    "text": '"five"',
    "the text nan": '"nan"',
    "empty": '""',
    "null": "null",
    "a list": "[[0.5]]",
    "an object": '{"a": 1}',
}


def _rows(place: Place, column: str, value: str) -> str:
    """Writes two rows whose column holds a value, which is no valid JSON if Python alone can read it."""
    return str(place.rows(*[json.dumps(_ROW)[:-1] + f', "{column}": {value}}}'] * 2))


def _data(column: str, options: tuple[str, ...], value: str, place: Place, rng: Random) -> list[str]:
    return ["data", _rows(place, column, value), *options]


def _ranking(value: str, place: Place, rng: Random) -> list[str]:
    row = f'{{"prompt": "w1", "completions": ["w2", "w3"], "scores": [0.5, {value}]}}'
    return ["data", str(place.rows(row, row)), "--data.reward", "scores"]


def _pairs(column: str, options: tuple[str, ...], value: str, place: Place, rng: Random) -> list[str]:
    return ["pairs", "--samples", _rows(place, column, value), "--out", place.out, *options]


def _select(column: str, options: tuple[str, ...], value: str, place: Place, rng: Random) -> list[str]:
    return ["select", "--data.eval", _rows(place, column, value), "--out", place.out, *options]


def _cases() -> list[Case]:
    commands = {
        "a reward in training": (
            partial(_data, "n", ("--kind", "returns", "--data.reward", "n")),
            "column 'n' (is null|holds no number).*a number from",
        ),
        "a label in training": (
            partial(_data, "label", ("--kind", "labels")),
            "column 'label' (is null|holds no label).*true or false|no column 'label'",
        ),
        "a score of a ranking": (_ranking, "'scores'"),
        "a reward of pairs": (
            partial(_pairs, "n", ("--reward", "n")),
            "row 1: column 'n' (is null|holds no number).*a number from",
        ),
        "a label of pairs": (partial(_pairs, "label", ()), "row 1: column 'label' (is null|holds no label).*--reward"),
        "a first wrong step": (
            partial(_pairs, "n", ("--steps", "--wrong_step", "n")),
            "row 1, column 'n': found .*first wrong",
        ),
        "a label of responses": (partial(_select, "label", ()), "row 1: column 'label' (is null|holds no label)"),
    }
    cases = [
        Case(f"outcome: {what} is {kind}", partial(write, value), says)
        for what, (write, says) in commands.items()
        for kind, value in _NO_NUMBERS.items()
    ]
    right = partial(_select, "right", ("--right", "right"))
    for kind in ("NaN", "infinite", "empty", "null", "a list", "an object"):
        case = partial(right, _NO_NUMBERS[kind])
        cases.append(Case(f"outcome: a right answer is {kind}", case, "row 1: column 'right' holds .*finite number"))
    return cases


CASES = _cases()
