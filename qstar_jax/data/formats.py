"""Recognizes the format of a file by its columns; `rewriting` then brings its rows into those that `records` reads.

| format | columns |
|---|---|
| pairs | (prompt), chosen, rejected; Step-DPO's have initial_reason_steps as well |
| arena | conversation_a and _b, or prompt, response_a and _b; winner, or winner_model_a, winner_model_b, winner_tie |
| ranking | prompt, completions (or responses, answers): several responses with scores or ranks |
| single | (prompt), completion (or messages, conversations), and a label or a reward |

Prompts may be instruction (and input, history), as in Alpaca's and LLaMA-Factory's files.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qstar_jax.config import DataOptions
from qstar_jax.data.battles import holds_battles
from qstar_jax.data.dropped import BadRow
from qstar_jax.data.outcomes import find_reward, sample
from qstar_jax.data.rankings import list_column
from qstar_jax.errors import InputError

Rows = Iterable[dict | BadRow]  # may be read anew whenever they are iterated

# What each kind of data can be made of, the usual format first.
_FORMATS = {
    "preferences": ("pairs", "arena", "ranking"),
    "rankings": ("ranking", "pairs", "arena"),
    "labels": ("single", "pairs", "arena", "ranking"),
    "returns": ("single", "ranking"),
}
_READ_BY = {
    "single": "losses of single responses (loss.name kto and implicit_prm read labels, a_star and qrpo rewards)",
    "ranking": "losses of pairs, rankings, labels and returns",
    "pairs": "losses of pairs, rankings and labels",
    "arena": "losses of pairs, rankings and labels",
}


@dataclass(frozen=True)
class File:
    """The rows of a file and what is known of their columns.

    Attributes:
        rows: As they were read.
        options: Names of columns, and the rule that makes pairs.
        source: The user's name for it, for errors.
        columns: Those that hold something other than null in any row.
    """

    rows: Rows
    options: DataOptions
    source: str
    columns: frozenset[str]

    @classmethod
    def of(cls, rows: Rows, options: DataOptions, source: str) -> "File":
        """Collects the columns of rows."""
        dicts = (row for row in rows if isinstance(row, dict))
        return cls(
            rows, options, source, frozenset(n for row in dicts for n, value in row.items() if value is not None)
        )

    def has(self, option: str) -> bool:
        """Whether the file has the option's column, or the user named one, which is never ignored."""
        column = getattr(self.options, option)
        return column is not None and (column != getattr(DataOptions, option) or column in self.columns)

    @property
    def response(self) -> str | None:
        """Column of single responses, or of whole dialogues with one."""
        if self.has("completion"):
            return self.options.completion
        return next((name for name in ("messages", "conversations") if name in self.columns), None)


def recognize(kind: str, file: File) -> str:
    """Names the format of a file, given what it shall become; the usual one of that kind if none fits.

    Raises:
        InputError: Several formats fit, or only one of another kind of data.
    """
    usable = _FORMATS[kind]
    if (chosen := file.options.format) is not None:
        if chosen not in usable:
            raise InputError(
                f"data.format {chosen} is for {_READ_BY[chosen]}; this needs {kind}, made of {', '.join(usable)}"
            )
        return chosen
    fitting = formats_of(file)
    if len(names := [name for name in usable if name in fitting]) > 1:
        raise InputError(
            f"{file.source}: its columns ({', '.join(sorted(file.columns))}) fit several formats "
            f"({', '.join(names)}); choose one with --data.format"
        )
    if not names and fitting:
        raise InputError(
            f"{file.source} holds rows of the format {fitting[0]!r} (columns: {', '.join(sorted(file.columns))}), "
            f"which is for {_READ_BY[fitting[0]]}; this needs {kind}, made of {', '.join(usable)}"
        )
    return names[0] if names else usable[0]


def formats_of(file: File) -> list[str]:
    """Names all formats that the columns of a file fit."""
    columns, options = file.columns, file.options
    named = any(getattr(options, name) != getattr(DataOptions, name) for name in ("chosen", "rejected"))
    fits = {
        "pairs": {options.chosen, options.rejected} <= columns or named,
        "arena": holds_battles(columns),
        "ranking": list_column(file.rows, options, columns) is not None,
    }
    if not any(fits.values()) and file.response is not None:
        fits["single"] = options.label in columns or find_reward(file.rows, options) is not None
    return [name for name, fit in fits.items() if fit]


def prompt_reader(file: File, *, separate: bool) -> Callable[[dict], dict]:
    """Finds where the prompts of a file are.

    Args:
        file: The file.
        separate: Whether responses have columns of their own, so that `conversations` can hold the prompt only.

    Returns:
        A function that puts the prompt of a row into the column `options.prompt`, if it lies elsewhere.
    """
    prompt, columns = file.options.prompt, file.columns
    if file.has("prompt"):
        return lambda row: row
    if "instruction" in columns:
        return lambda row: {**row, prompt: _instruction(row)}
    if separate and (name := _open_dialogues(file)) is not None:
        return lambda row: {**row, prompt: row.get(name)}
    return lambda row: row


def _open_dialogues(file: File) -> str | None:
    """Column of dialogues that responses continue: `conversations`, or `messages` unless the assistant ends these."""
    if "conversations" in file.columns:
        return "conversations"
    ends = [value[-1] for row in sample(file.rows) if isinstance(value := row.get("messages"), list) and value]
    is_open = ends and all(isinstance(end, dict) and end.get("role") != "assistant" for end in ends)
    return "messages" if is_open else None


def _instruction(row: dict) -> Any:
    """Joins the parts of Alpaca's prompts: earlier turns, instruction and input."""
    text, more, history = (row.get(name) for name in ("instruction", "input", "history"))
    if isinstance(text, str) and isinstance(more, str) and more.strip():
        text = f"{text}\n{more}"
    if not history:
        return text
    try:
        turns = [
            {"role": role, "content": content}
            for user, assistant in history
            for role, content in (("user", user), ("assistant", assistant))
        ]
    except (TypeError, ValueError) as error:
        raise BadRow("column 'history' holds no list of [user, assistant]", f" ({error})") from error
    return [*turns, {"role": "user", "content": text}]
