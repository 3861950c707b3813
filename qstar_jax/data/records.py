"""Parses a row into a record: a prompt and its responses, either all text or all chat messages."""

from dataclasses import dataclass
from typing import Any, Literal

from qstar_jax.config import DataOptions
from qstar_jax.data.columns import Messages, Turns, parse_system, parse_tools, parse_turns
from qstar_jax.data.dialogues import (
    ASSISTANT_MARKER,
    is_dialogue,
    remove_prompt,
    split_dialogues,
    text_of,
    unify_form,
)
from qstar_jax.data.dropped import BadRow, DroppedRow

_EXPECTED = {
    "preferences": "prompt, chosen, rejected",
    "completions": "prompt, completion (or prompt, chosen; or messages)",
    "prompts": "prompt",
}


@dataclass(frozen=True)
class Record:
    """One prompt and its responses, before tokenization.

    Attributes:
        prompt: Text, or chat messages.
        responses: (chosen, rejected), (response,) or (), in the form of the prompt; in chats, one assistant message
            each.
        row: Index of its row, from 0.
        tools: JSON schemas for the chat template; None if the row has none.
        repeats: Whether the responses repeat their prompt in the file, and if so, whether it was removed.
    """

    prompt: str | Messages
    responses: tuple[str | Messages, ...]
    row: int
    tools: list[dict] | None = None
    repeats: Literal["no", "removed", "kept"] = "no"


@dataclass(frozen=True)
class FileLayout:
    """The columns of a file.

    Attributes:
        kind: What its rows become: preferences, completions or prompts.
        prompt: Column of the prompt; None if the columns of the responses hold whole dialogues.
        responses: Label of each response in messages -> (option that names its column, column).
        tools: Column of the tools, if any.
        system: Column of the system message, if any.
        encoded: Columns whose messages are encoded as JSON strings.
    """

    kind: Literal["preferences", "completions", "prompts"]
    prompt: str | None
    responses: dict[str, tuple[str, str]]
    tools: str | None = None
    system: str | None = None
    encoded: frozenset[str] = frozenset()

    @property
    def columns(self) -> list[str]:
        """The columns of texts or messages."""
        columns = [column for _, column in self.responses.values()]
        return columns if self.prompt is None else [self.prompt, *columns]


def read_record(row: dict | BadRow, index: int, layout: FileLayout, options: DataOptions) -> Record:
    """Parses the prompt and the responses of a row; `index` counts from 0.

    Returns:
        The record; its responses may be empty or equal, see `check_responses`.

    Raises:
        BadRow: The row lacks a column, or a column holds something else.
    """
    if isinstance(row, BadRow):
        raise row
    # Separate the prompt from the responses: by columns, or by the turns of whole dialogues.
    responses = [_turns(row, option, column, layout) for option, column in layout.responses.values()]
    if layout.prompt is None:
        for response, (_, column) in zip(responses, layout.responses.values(), strict=True):
            _check_dialogue(response, column, row, layout, options)
        prompt, responses = split_dialogues(responses)
    else:
        prompt = _turns(row, "prompt", layout.prompt, layout)
        prompt, responses = remove_prompt(prompt, responses)
        _check_prompt(prompt, layout.prompt, options)
    # Bring both into the same form, then add what only chats can have.
    prompt, responses = unify_form(prompt, responses, options.as_chat)
    system = layout.system and parse_system(_value(row, "system", layout.system, layout), layout.system)
    tools = layout.tools and parse_tools(_value(row, "tools", layout.tools, layout), layout.tools)
    if tools and isinstance(prompt, str):
        raise _needs_chat(layout.tools, "tools")
    return Record(_with_system(prompt, system, layout.system) if system else prompt, tuple(responses), index, tools)


def check_responses(record: Record, layout: FileLayout) -> Record:
    """Returns the record if its responses can be trained on.

    Raises:
        BadRow: A response is empty, or in a chat not a single assistant message.
        DroppedRow: The two responses are equal.
    """
    for response, label in zip(record.responses, layout.responses, strict=True):
        name = f"{label} response".strip()
        if isinstance(response, list) and (roles := [message["role"] for message in response]) != ["assistant"]:
            listing = ", ".join(map(repr, roles)) or "no messages"
            raise BadRow(f"{name} is not a single assistant message", f" (roles: {listing})")
        if not text_of(response).strip():
            raise BadRow(f"empty {name}")
    if len(record.responses) > 1 and record.responses[0] == record.responses[1]:
        raise DroppedRow("chosen equals rejected")
    return record


def _value(row: dict, option: str, column: str, layout: FileLayout) -> Any:
    """Returns the value in a column; optional columns may be missing in some rows."""
    if column in row or (option in ("tools", "system") and column == getattr(DataOptions, option)):
        return row.get(column)
    fix = "" if option == "messages" else f"; name yours with --data.{option}"
    raise BadRow(f"no column {column!r}", f" ({_columns(row)}); expected {_EXPECTED[layout.kind]}{fix}")


def _turns(row: dict, option: str, column: str, layout: FileLayout) -> Turns:
    return parse_turns(_value(row, option, column, layout), column, encoded=column in layout.encoded)


def _columns(row: dict) -> str:
    return "found: " + (", ".join(map(repr, row)) or "none")


def _check_dialogue(turns: Turns, column: str, row: dict, layout: FileLayout, options: DataOptions):
    if not is_dialogue(turns):
        raise BadRow(
            f"no column {options.prompt!r}",
            f" ({_columns(row)}), and {column!r} is not a whole dialogue (chat messages, or text with "
            f"{ASSISTANT_MARKER!r}); expected {_EXPECTED[layout.kind]}; name yours with --data.prompt",
        )
    if options.as_chat and isinstance(turns, str):
        raise _no_chat(column)


def _check_prompt(prompt: Turns, column: str, options: DataOptions):
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        raise BadRow(
            f"column {column!r} ends with the assistant's turn",
            "; expected that of a user or a tool: responses that continue a turn are not supported",
        )
    if options.as_chat and isinstance(prompt, str) and prompt.rstrip().endswith(ASSISTANT_MARKER):
        raise _no_chat(column)


def _no_chat(column: str) -> BadRow:
    return BadRow(
        f"--data.as_chat cannot split {column!r}, which holds dialogues in plain text",
        "; turn it off, or convert the file to chat messages",
    )


def _needs_chat(column: str, option: str) -> BadRow:
    return BadRow(
        f"the column {column!r} needs chat messages, but this is plain text",
        f"; turn the rows into chat messages with --data.as_chat, or drop the column with --data.{option} null",
    )


def _with_system(prompt: Turns, system: str, column: str) -> Messages:
    if isinstance(prompt, str):
        raise _needs_chat(column, "system")
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] != system:
        raise BadRow(f"the column {column!r} and the system message of the prompt differ")
    return prompt
