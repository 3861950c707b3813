"""One row -> one record: a prompt and its answers, either all text or all chat messages."""

from dataclasses import dataclass
from typing import Any, Literal

from qstar_jax.config import DataOptions
from qstar_jax.data.columns import Messages, Turns, checked_system, checked_tools, checked_turns
from qstar_jax.data.dialogues import (
    ASSISTANT_MARKER,
    is_dialogue,
    same_form,
    split_dialogues,
    text_of,
    without_prompt,
)
from qstar_jax.data.dropped import BadRow, DroppedRow

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
        tools: JSON schemas for the chat template; None where the row has none.
        repeats: Whether the answers repeat their prompt in the file, and if so, whether it was taken off.
    """

    prompt: str | Messages
    responses: tuple[str | Messages, ...]
    row: int
    tools: list[dict] | None = None
    repeats: Literal["no", "removed", "kept"] = "no"


@dataclass(frozen=True)
class Layout:
    """Which columns a file has.

    Args:
        kind: What its rows become: preferences, completions or prompts.
        prompt: Column of the prompt; None where the answers' columns hold whole dialogues.
        answers: Name of the answer in reasons -> (option that names its column, column).
        tools: Column of the tools; None where there is none.
        system: Column of the system message; None where there is none.
        encoded: Columns whose messages are written as JSON.
    """

    kind: Literal["preferences", "completions", "prompts"]
    prompt: str | None
    answers: dict[str, tuple[str, str]]
    tools: str | None = None
    system: str | None = None
    encoded: frozenset[str] = frozenset()

    @property
    def columns(self) -> list[str]:
        """Columns of texts or messages."""
        answers = [column for _, column in self.answers.values()]
        return answers if self.prompt is None else [self.prompt, *answers]


def read_record(row: dict | BadRow, index: int, layout: Layout, options: DataOptions) -> Record:
    """Reads prompt and answers of one row.

    Args:
        row: As it was read.
        index: Its number, from 0.
        layout: Of the file.
        options: Whether plain text becomes chat messages.

    Returns:
        The record; its answers may be empty or equal, see `check_answers`.

    Raises:
        BadRow: The row lacks a column, or holds something else in it.
    """
    if isinstance(row, BadRow):
        raise row
    answers = [_turns(row, option, column, layout) for option, column in layout.answers.values()]
    if layout.prompt is None:
        for answer, (_, column) in zip(answers, layout.answers.values(), strict=True):
            _check_dialogue(answer, column, row, layout, options)
        prompt, answers = split_dialogues(answers)
    else:
        prompt = _turns(row, "prompt", layout.prompt, layout)
        prompt, answers = without_prompt(prompt, answers)
        _check_prompt(prompt, layout.prompt, options)
    prompt, answers = same_form(prompt, answers, options.as_chat)
    system = layout.system and checked_system(_value(row, "system", layout.system, layout), layout.system)
    tools = layout.tools and checked_tools(_value(row, "tools", layout.tools, layout), layout.tools)
    if tools and isinstance(prompt, str):
        raise _no_place(layout.tools, "tools")
    return Record(_with_system(prompt, system, layout.system) if system else prompt, tuple(answers), index, tools)


def check_answers(record: Record, layout: Layout) -> Record:
    """The record, if its answers can be learnt from.

    Raises:
        BadRow: An answer is empty, or in a chat not one assistant message.
        DroppedRow: The two answers are equal.
    """
    for answer, label in zip(record.responses, layout.answers, strict=True):
        name = f"{label} answer".strip()
        if isinstance(answer, list) and (roles := [message["role"] for message in answer]) != ["assistant"]:
            found = ", ".join(map(repr, roles)) or "no messages"
            raise BadRow(f"{name} is not one assistant message", f" (roles: {found})")
        if not text_of(answer).strip():
            raise BadRow(f"empty {name}")
    if len(record.responses) > 1 and record.responses[0] == record.responses[1]:
        raise DroppedRow("chosen equals rejected")
    return record


def _value(row: dict, option: str, column: str, layout: Layout) -> Any:
    """What the row holds; optional columns may be missing in some rows."""
    if column in row or (option in ("tools", "system") and column == getattr(DataOptions, option)):
        return row.get(column)
    fix = "" if option == "messages" else f"; name yours with --data.{option}"
    raise BadRow(f"no column {column!r}", f" ({_found(row)}); expected {_EXPECTED[layout.kind]}{fix}")


def _turns(row: dict, option: str, column: str, layout: Layout) -> Turns:
    return checked_turns(_value(row, option, column, layout), column, encoded=column in layout.encoded)


def _found(row: dict) -> str:
    return "found: " + (", ".join(map(repr, row)) or "none")


def _check_dialogue(turns: Turns, column: str, row: dict, layout: Layout, options: DataOptions):
    if not is_dialogue(turns):
        raise BadRow(
            f"no column {options.prompt!r}",
            f" ({_found(row)}), and {column!r} is no whole dialogue (chat messages, or text with "
            f"{ASSISTANT_MARKER!r}); expected {_EXPECTED[layout.kind]}; name yours with --data.prompt",
        )
    if options.as_chat and isinstance(turns, str):
        raise _no_chat(column)


def _check_prompt(prompt: Turns, column: str, options: DataOptions):
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        raise BadRow(
            f"column {column!r} ends with the assistant's turn",
            "; expected that of a user or a tool: answers that go on with a turn are not supported",
        )
    if options.as_chat and isinstance(prompt, str) and prompt.rstrip().endswith(ASSISTANT_MARKER):
        raise _no_chat(column)


def _no_chat(column: str) -> BadRow:
    return BadRow(
        f"--data.as_chat cannot take {column!r} apart, as it holds dialogues in text",
        "; leave it off, or give the file chat messages",
    )


def _no_place(column: str, option: str) -> BadRow:
    return BadRow(
        f"plain text has no place for the column {column!r}",
        f"; make chat messages of the rows with --data.as_chat, or leave it out with --data.{option} null",
    )


def _with_system(prompt: Turns, system: str, column: str) -> Messages:
    if isinstance(prompt, str):
        raise _no_place(column, "system")
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] != system:
        raise BadRow(f"the column {column!r} and the system message of the prompt differ")
    return prompt
