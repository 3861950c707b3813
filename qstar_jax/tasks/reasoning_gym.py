"""Generated questions of the package reasoning-gym, and its scorers as true rewards.

`reasoning-gym:chain_sum?seed=3&size=500` names 500 questions of one of its generators to train on (split train), and a
tenth as many others (split test); further options are those of the generator, such as `&max_terms=3`.
"""

import difflib
import inspect
import json
import re
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from qstar_jax.errors import InputError
from qstar_jax.tasks.task import Task

PREFIX = "reasoning-gym:"
SPLITS = ("train", "test")
_SIZE = 500
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# What runs text as code: sympy's parsers call eval.
_RUNS_TEXT = re.compile(r"\b(?:eval|exec|parse_expr|sympify|S|parse_latex)\(")


@lru_cache(maxsize=8)
def open_task(source: str) -> Task:
    """Makes the task that a source names.

    Args:
        source: "reasoning-gym:", the name of a generator, and perhaps options: ?seed=3&size=500 and its own.

    Returns:
        The task: its rows have `prompt`, `completion` and `answer`, the latter two the same text, and its true reward
        is the package's score, in [0, 1], of what a response has in its last <answer> tags, or of all of it.

    Raises:
        InputError: reasoning-gym is not installed, has no such generator, refuses an option, or its scorer runs
            responses as code.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    options = {"seed": 0, "size": _SIZE} | {key: _parsed(value) for key, value in parse_qsl(query, True)}
    for key, least in (("seed", 0), ("size", 1)):
        if type(options[key]) is not int or options[key] < least:
            raise InputError(f"{source}: {key} is {options[key]!r}; expected a whole number, at least {least}")
    size = options["size"]
    # Question n depends on seed + n, so the held-out ones are those behind the others, not those of the next seed.
    made = _make(source, name, options | {"size": size + max(size // 10, 1)})
    entries = [made[n] for n in range(len(made))]
    asked = {entry["question"] for entry in entries[:size]}
    held_out = {entry["question"]: entry for entry in reversed(entries[size:]) if entry["question"] not in asked}
    by_split = {"train": entries[:size], "test": list(reversed(held_out.values()))}
    by_question = {entry["question"]: entry for entry in entries}

    def rows(split: str, seed: int, limit: int | None) -> list[dict]:
        return [_row(entry) for entry in by_split[split][:limit]]

    def true_reward(prompt: str, response: str) -> float | None:
        entry = by_question.get(prompt)
        return None if entry is None else float(made.score_answer(_answer(response), entry))

    return Task(name, SPLITS, rows, true_reward=true_reward)


def _parsed(value: str) -> Any:
    """Reads a number, a truth value or a list; anything else is text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def _make(source: str, name: str, options: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise InputError(
            f"{source} needs the package reasoning-gym ({error}): pip install 'qstar_jax[reasoning-gym]'"
        ) from error
    if name not in DATASETS:
        nearest = ", ".join(difflib.get_close_matches(name, DATASETS, n=3, cutoff=0))
        raise InputError(f"{source}: reasoning-gym has no generator {name!r}; the nearest: {nearest}")
    if found := _RUNS_TEXT.search(inspect.getsource(DATASETS[name][0].score_answer)):
        raise InputError(
            f"{source}: its scorer runs responses as code ({found[0]}...)), which is not done here; choose another "
            "generator, or write its questions to a file and use --reward.kind verifier"
        )
    try:
        return reasoning_gym.create_dataset(name, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"{source}: reasoning-gym refuses these options ({error})") from error


def _row(entry: dict[str, Any]) -> dict[str, str]:
    answer = str(entry["answer"])
    return {"prompt": entry["question"], "completion": answer, "answer": answer}


def _answer(response: str) -> str:
    return (_TAGGED.findall(response) or [response])[-1].strip()
