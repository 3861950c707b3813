"""Rows of any accepted form -> records with one prompt and its answers, either all text or all chat messages."""

from dataclasses import dataclass

from qstar_jax.config import DataOptions
from qstar_jax.data.dialogues import (
    ASSISTANT_MARKER,
    Messages,
    Turns,
    checked_turns,
    is_dialogue,
    same_form,
    split_dialogues,
    text_of,
    without_prompt,
)
from qstar_jax.data.dropped import Dropped, DroppedRow, counted_reasons
from qstar_jax.errors import InputError

_EXPECTED = {
    "preferences": "prompt, chosen, rejected",
    "completions": "prompt, completion (or prompt, chosen; or messages)",
    "prompts": "prompt",
}


@dataclass(frozen=True)
class Record:
    """One prompt and its answers, before tokenisation.

    Args:
        prompt: Text, or chat messages.
        responses: (chosen, rejected), (answer,) or (), in the form of the prompt; in chats one assistant message each.
        row: Index of the row it came from, counted from 0.
    """

    prompt: str | Messages
    responses: tuple[str | Messages, ...]
    row: int


@dataclass(frozen=True)
class _Layout:
    """Which columns a file has: `prompt` is None where the answers' columns hold whole dialogues.

    `answers` maps the name of the answer in reasons to (option that names the column, column).
    """

    kind: str
    prompt: str | None
    answers: dict[str, tuple[str, str]]


def preference_records(rows: list[dict], options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows with a preferred and another answer into records with two responses: chosen, rejected.

    Args:
        rows: Rows as read; the columns of the first one say which form the file has.
        options: Names of the columns, and whether plain text becomes chat messages.
        source: Name of the file, for errors.

    Returns:
        The records and the rows that were dropped, both in file order.

    Raises:
        InputError: A column is missing or of the wrong type, or no row can be used.
    """
    answers = {"chosen": ("chosen", options.chosen), "rejected": ("rejected", options.rejected)}
    layout = _Layout("preferences", _prompt_column(rows, options), answers)
    return _records(rows, layout, options, source)


def completion_records(rows: list[dict], options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows with one answer into records with one response, for supervised fine-tuning.

    The answer is the column `options.completion`; else `options.chosen`; else the last turn of the column `messages`.
    Args, returns and errors are those of `preference_records`.
    """
    prompt = _prompt_column(rows, options)
    first = rows[0] if rows else {}
    if _names_column("completion", first, options):
        answer = ("completion", options.completion)
    elif _names_column("chosen", first, options):
        answer = ("chosen", options.chosen)
    elif "messages" in first:
        prompt, answer = None, ("messages", "messages")
    else:
        answer = ("completion", options.completion)
    return _records(rows, _Layout("completions", prompt, {"": answer}), options, source)


def prompt_records(rows: list[dict], options: DataOptions, source: str) -> tuple[list[Record], list[Dropped]]:
    """Turns rows into records without responses, for generation.

    Where there is no prompt column, the prompt is that of the dialogues in `options.chosen`, else in `messages`.
    Args, returns and errors are those of `preference_records`.
    """
    prompt = _prompt_column(rows, options)
    answers = {}
    if prompt is None:
        first = rows[0] if rows else {}
        column = next((name for name in (options.chosen, "messages") if name in first), None)
        prompt = options.prompt if column is None else None
        answers = {} if column is None else {"": ("chosen", column)}
    records, dropped = _records(rows, _Layout("prompts", prompt, answers), options, source)
    return [Record(record.prompt, (), record.row) for record in records], dropped


def _names_column(option: str, row: dict, options: DataOptions) -> bool:
    """Whether the row has the option's column, or the user named one: a name of the user's is never passed over."""
    column = getattr(options, option)
    return column in row or column != getattr(DataOptions, option)


def _prompt_column(rows: list[dict], options: DataOptions) -> str | None:
    return options.prompt if rows and _names_column("prompt", rows[0], options) else None


def _records(
    rows: list[dict], layout: _Layout, options: DataOptions, source: str
) -> tuple[list[Record], list[Dropped]]:
    records, dropped = [], []
    for index, row in enumerate(rows):
        try:
            records.append(_record(row, index, layout, options, f"{source} row {index + 1}"))
        except DroppedRow as reason:
            dropped.append(Dropped(index, str(reason)))
    if not records:
        reasons = counted_reasons(dropped) or "there are none"
        raise InputError(f"{source}: none of its {len(rows)} rows can be used ({reasons})")
    return records, dropped


def _record(row: dict, index: int, layout: _Layout, options: DataOptions, where: str) -> Record:
    answers = [_column(row, option, name, layout, where) for option, name in layout.answers.values()]
    if layout.prompt is None:
        for answer, (_, name) in zip(answers, layout.answers.values(), strict=True):
            _check_dialogue(answer, name, row, layout, options, where)
        prompt, answers = split_dialogues(answers)
    else:
        prompt = _column(row, "prompt", layout.prompt, layout, where)
        prompt, answers = without_prompt(prompt, answers)
    prompt, answers = same_form(prompt, answers, options.as_chat)
    if layout.kind != "prompts":
        _check_answers(answers, list(layout.answers))
    return Record(prompt, tuple(answers), index)


def _column(row: dict, option: str, name: str, layout: _Layout, where: str) -> Turns:
    if name not in row:
        fix = "" if option == "messages" else f"; name yours with --data.{option}"
        raise InputError(f"{where}: no column {name!r} ({_found(row)}); expected {_EXPECTED[layout.kind]}{fix}")
    return checked_turns(row[name], f"{where}: column {name!r}")


def _found(row: dict) -> str:
    return "found: " + (", ".join(map(repr, row)) or "none")


def _check_dialogue(turns: Turns, name: str, row: dict, layout: _Layout, options: DataOptions, where: str) -> None:
    if not is_dialogue(turns):
        raise InputError(
            f"{where}: no column {options.prompt!r} ({_found(row)}), and {name!r} is no whole dialogue (chat messages, "
            f"or text with {ASSISTANT_MARKER!r}); expected {_EXPECTED[layout.kind]}; name yours with --data.prompt"
        )
    if options.as_chat and isinstance(turns, str):
        raise InputError(
            f"{where}: --data.as_chat cannot take {name!r} apart, as it holds dialogues in text; leave it off, or "
            f"give the file a column {options.prompt!r} or chat messages"
        )


def _check_answers(answers: list[Turns], labels: list[str]) -> None:
    for answer, label in zip(answers, labels, strict=True):
        name = f"{label} answer".strip()
        if isinstance(answer, list) and [message["role"] for message in answer] != ["assistant"]:
            raise DroppedRow(f"{name} is not one assistant message")
        if not text_of(answer).strip():
            raise DroppedRow(f"empty {name}")
    if len(answers) > 1 and answers[0] == answers[1]:
        raise DroppedRow("chosen equals rejected")
