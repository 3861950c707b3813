"""Parses a row into a record: a prompt and its responses, either all text or all chat messages."""

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from qstar_jax.config import DataOptions
from qstar_jax.data.columns import Messages, Turns, parse_system, parse_template_kwargs, parse_tools, parse_turns
from qstar_jax.data.dialogues import (
    ASSISTANT_MARKER,
    is_dialogue,
    remove_prompt,
    share_turns,
    split_dialogues,
    unify_form,
)
from qstar_jax.data.dropped import BadRow, DroppedRow
from qstar_jax.data.outcomes import LABEL, OPEN_END, OTHER, REWARD, parse_rewards
from qstar_jax.data.rankings import IGNORED_SYSTEM

Kind = Literal["preferences", "completions", "prompts", "rankings", "labels", "returns"]
_EXPECTED = {
    "preferences": "prompt, chosen, rejected",
    "completions": "prompt, completion (or prompt, chosen; or messages)",
    "prompts": "prompt",
    "rankings": "prompt, completions with scores",
    "labels": "prompt, completion, label",
    "returns": "prompt, completion, reward",
}
TEMPLATE_KWARGS = "chat_template_kwargs"  # column of variables of the chat template


@dataclass(frozen=True)
class Record:
    """One prompt and its responses, before tokenization.

    Attributes:
        prompt: Text, or chat messages.
        responses: (chosen, rejected), (response,) or (), or a ranking, best first, in the form of the prompt; in chats,
            messages of which the first and the last are the assistant's.
        row: Index of its row, from 0.
        tools: JSON schemas for the chat template; None if the row has none.
        template_kwargs: Variables for the chat template; None if the row has none.
        open_end: Whether the responses are steps, which do not end with EOS.
        label: Whether a single response is desirable; None without labels.
        reward: Reward of a single response; None without rewards.
        reference_rewards: Rewards of the reference's responses to the prompt; empty without any.
        ignored_system: Keys of the responses' own system prompts, if these are not read; empty if there are none.
        repeats: Whether the responses repeat their prompt in the file, and if so, whether it was removed.
    """

    prompt: str | Messages
    responses: tuple[str | Messages, ...]
    row: int
    tools: list[dict] | None = None
    template_kwargs: dict[str, Any] | None = None
    open_end: bool = False
    label: bool | None = None
    reward: float | None = None
    reference_rewards: tuple[float, ...] = ()
    ignored_system: str = ""
    repeats: Literal["no", "removed", "kept"] = "no"

    @property
    def outcome(self) -> dict[str, np.ndarray]:
        """What was said of a single response: `labels`, or `rewards` and `reference_rewards`; empty for other kinds."""
        if self.label is not None:
            return {"labels": np.asarray(self.label)}
        if self.reward is not None:
            return {"rewards": np.float32(self.reward), "reference_rewards": np.float32(self.reference_rewards)}
        return {}


@dataclass(frozen=True)
class FileLayout:
    """The columns of a file.

    Attributes:
        kind: What its rows become, see `loading.read_records`.
        prompt: Column of the prompt; None if the columns of the responses hold whole dialogues.
        responses: Label of each response in messages -> (option that names its column, column).
        tools: Column of the tools, if any.
        system: Column of the system message, if any.
        reference_rewards: Column of the rewards of the reference's responses, if any.
        encoded: Columns whose messages are encoded as JSON strings.
    """

    kind: Kind
    prompt: str | None
    responses: dict[str, tuple[str, str]]
    tools: str | None = None
    system: str | None = None
    reference_rewards: str | None = None
    encoded: frozenset[str] = frozenset()

    @property
    def columns(self) -> list[str]:
        """The columns of texts or messages."""
        columns = [column for _, column in self.responses.values()]
        return columns if self.prompt is None else [self.prompt, *columns]


def read_record(row: dict | DroppedRow, index: int, layout: FileLayout, options: DataOptions) -> Record:
    """Parses the prompt and the responses of a row; `index` counts from 0.

    Returns:
        The record; its responses may be empty or equal, see `check_responses`.

    Raises:
        DroppedRow: The row was dropped before.
        BadRow: The row lacks a column, or a column holds something else.
    """
    if isinstance(row, DroppedRow):
        raise row
    prompt, responses = _separate(row, layout, options)
    # Add what only chats can have.
    system = layout.system and parse_system(_value(row, "system", layout.system, layout), layout.system)
    tools = layout.tools and parse_tools(_value(row, "tools", layout.tools, layout), layout.tools)
    if tools and isinstance(prompt, str):
        raise _needs_chat(layout.tools, "tools")
    variables = parse_template_kwargs(row.get(TEMPLATE_KWARGS), TEMPLATE_KWARGS)
    if variables and isinstance(prompt, str):
        raise BadRow(f"the column {TEMPLATE_KWARGS!r} needs chat messages", ", but this is plain text; --data.as_chat")
    rewards = layout.reference_rewards and parse_rewards(row, layout.reference_rewards)
    return Record(
        _with_system(prompt, system, layout.system) if system else prompt,
        tuple(responses),
        index,
        tools,
        variables,
        open_end=row.get(OPEN_END, False),
        label=row.get(LABEL),
        reward=row.get(REWARD),
        reference_rewards=tuple(rewards or ()),
        ignored_system=row.get(IGNORED_SYSTEM, ""),
    )


def _separate(row: dict, layout: FileLayout, options: DataOptions) -> tuple[Turns, list[Turns]]:
    """Separates the prompt from the responses, by columns or by turns, and brings both into the same form."""
    columns = [named for named in layout.responses.values() if layout.kind != "rankings" or named[1] in row]
    responses = [_turns(row, option, column, layout) for option, column in columns]
    if row.get(OTHER) is not None:
        responses.append(parse_turns(row[OTHER], OTHER, encoded=bool(layout.encoded)))
    if layout.prompt is None:
        for response, (_, column) in zip(responses, columns, strict=False):
            _check_dialogue(response, column, row, layout, options)
        prompt, responses = split_dialogues(responses, last=layout.kind == "prompts" or options.turns != "all")
    else:
        prompt = _turns(row, "prompt", layout.prompt, layout)
        prompt, responses = remove_prompt(prompt, responses)
        _check_prompt(prompt, layout.prompt, options)
    prompt, responses = unify_form(prompt, responses, options.as_chat)
    if isinstance(prompt, list) and len(responses) > 1:
        prompt, responses = share_turns(prompt, responses)
    return prompt, responses[: len(columns)]


def check_responses(record: Record, layout: FileLayout) -> Record:
    """Returns the record if its responses can be trained on.

    Raises:
        BadRow: A response or a turn of it is empty, or a chat does not begin and end with the assistant's turn.
        DroppedRow: The two responses are equal.
    """
    for response, label in zip(record.responses, layout.responses, strict=False):
        name = f"{label} response".strip()
        if isinstance(response, list):
            roles = [message["role"] for message in response]
            if not roles or {roles[0], roles[-1]} != {"assistant"}:
                listing = ", ".join(map(repr, roles)) or "no messages"
                raise BadRow(f"{name} does not begin and end with an assistant turn", f" (roles: {listing})")
        if _is_empty(response):
            raise BadRow(f"empty {name}")
    if any(response == other for response, other in combinations(record.responses, 2)):
        is_pair = len(record.responses) == 2
        raise DroppedRow("chosen equals rejected" if is_pair else "two responses of the ranking are equal")
    return record


def last_turn(record: Record) -> Record:
    """Returns a record of which only the assistant's last turn is the response; plain text has no other."""
    if isinstance(record.prompt, str) or not record.responses:
        return record
    [response] = record.responses
    return replace(record, prompt=record.prompt + response[:-1], responses=(response[-1:],))


def _is_empty(response: Turns) -> bool:
    """Whether the response, or a turn of the assistant in it, has neither words nor tool calls."""
    if isinstance(response, str):
        return not response.strip()
    turns = [message for message in response if message["role"] == "assistant"]
    return not all(message["content"].strip() or message.get("tool_calls") for message in turns)


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
