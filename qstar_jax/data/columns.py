"""Parses the columns of a row: text, chat messages or tools. Any other value makes it a bad row."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from qstar_jax.data.dropped import BadRow

Messages = list[dict[str, Any]]
Turns = str | Messages

WEIGHT = "weight"  # key of OpenAI's messages: a turn of the assistant with weight 0 is not learned

_EXPECTED = "expected text or a list of chat messages ({'role': text, 'content': text})"
_EXPECTED_TOOLS = "expected a list of JSON schemas, or a JSON string of one"
# Roles of ShareGPT's and LLaMA-Factory's files -> those that chat templates know.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLS = ("function_call", "tool_call")  # whose text is JSON of calls
_SHARE_GPT = ("user", "assistant", "system", "tool", *_ROLES)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_FIRST_KEY = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value|name|tool_calls)["']\s*:""")


def parse_turns(value: Any, column: str, encoded: bool = False) -> Turns:
    """Parses text, or chat messages, whose null entries are removed (columnar files add them for missing keys).

    Messages may be those of OpenAI (with tool calls and without content, or with a list of texts as content) or of
    ShareGPT ({'from': 'human', 'value': text}); a single one need not be in a list.

    Args:
        value: Value of the column.
        column: Its name, for errors.
        encoded: Whether to decode texts that look like chat messages in JSON, see `columns_of_encoded_messages`.

    Returns:
        A string, or a list of dictionaries with at least the strings `role` and `content`.

    Raises:
        BadRow: The value is neither text nor chat messages.
    """
    if encoded and isinstance(value, str) and _looks_encoded(value):
        value = _decoded(value, column, _EXPECTED)
    _check_surrogates(value, column)
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"column {column!r} {_holds(value)}", f"; {_EXPECTED}")
    return [_parse_message(message, number, column) for number, message in enumerate(value, start=1)]


def _parse_message(message: Any, number: int, column: str) -> dict[str, Any]:
    """Translates a message into the form of chat templates, and checks it."""
    if isinstance(message, dict):
        message = without_nulls(_in_chat_form(message, number, column))
    _check_message(message, number, column)
    return message


def without_nulls(value: Any) -> Any:
    """Removes null entries of dictionaries at every depth: columnar files give each the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _in_chat_form(message: dict, number: int, column: str) -> dict[str, Any]:
    if message.keys() >= {"from", "value"} and "role" not in message:
        others = {key: entry for key, entry in message.items() if key not in ("from", "value")}
        message = {"role": message["from"], "content": message["value"], **others}
        if message["role"] not in _SHARE_GPT:
            raise BadRow(
                f"column {column!r} has a message from {message['role']!r}",
                f" (message {number}); expected one of {', '.join(_SHARE_GPT)}",
            )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        return message
    if role in _CALLS:
        return message | {"role": _ROLES[role], "content": "", "tool_calls": _calls(content, number, column)}
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        content = _joined(content, number, column)
    if content is None and message.get("tool_calls"):
        content = ""
    return message | ({"role": _ROLES.get(role, role)} | ({} if content is None else {"content": content}))


def _joined(parts: list[dict], number: int, column: str) -> str:
    """Joins the texts of a content that lists its parts."""
    for part in parts:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise BadRow(
                f"column {column!r} has a message with a part of type {part['type']!r}",
                f" (message {number}); expected text",
            )
    return "".join(part["text"] for part in parts)


def _calls(text: Any, number: int, column: str) -> list[dict]:
    """Parses the calls of a message of LLaMA-Factory: {"name": ..., "arguments": ...}, or a list of them, as JSON."""
    calls = _decoded(text, column, "expected a function call as JSON") if isinstance(text, str) else text
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise BadRow(
            f"column {column!r} has a call of a function without a name",
            f" (message {number}: {text!r}); expected JSON with name and arguments",
        )
    return [{"type": "function", "function": call} for call in calls]


def _check_message(message: Any, number: int, column: str):
    if not isinstance(message, dict):
        raise BadRow(
            f"column {column!r} holds a list of something other than messages",
            f" (item {number} is {'null' if message is None else type(message).__name__}); {_EXPECTED}",
        )
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            problem = f"whose {key!r} {_holds(message[key])}" if key in message else f"without {key!r}"
            keys = ", ".join(map(repr, message))
            raise BadRow(
                f"column {column!r} has a message {problem}",
                f" (message {number}, keys: {keys or 'none'}); {_EXPECTED}",
            )
    if message.get(WEIGHT, 1) not in (0, 1):
        raise BadRow(
            f"column {column!r} has a message whose {WEIGHT!r} is {message[WEIGHT]!r}",
            f" (message {number}); expected 1, or 0 for a turn of the assistant that is not learned",
        )


def parse_tools(value: Any, column: str) -> list[dict] | None:
    """Parses the tools of a row, for the chat template.

    Args:
        value: Value of the column: a list of JSON schemas; the list, or each schema, may be a JSON string.
        column: Its name, for errors.

    Returns:
        At least one schema, as {'type': 'function', 'function': ...}, or None if the row has no tools.

    Raises:
        BadRow: The value is something else.
    """
    if isinstance(value, str):
        value = _decoded(value, column, _EXPECTED_TOOLS) if value.strip() else None
    if isinstance(value, list):
        value = [_decoded(tool, column, _EXPECTED_TOOLS) if isinstance(tool, str) else tool for tool in value]
        _check_surrogates(value, column)
        if all(isinstance(tool, dict) for tool in value):
            return [_as_function(tool) for tool in without_nulls(value)] or None
    if value is not None:
        problem = "holds a list of something other than schemas" if isinstance(value, list) else _holds(value)
        raise BadRow(f"column {column!r} {problem}", f"; {_EXPECTED_TOOLS}")
    return None


def _as_function(tool: dict) -> dict:
    """Returns the schema of a function, as in LLaMA-Factory's files, in the form that chat templates expect."""
    return {"type": "function", "function": tool} if {"name", "parameters"} <= tool.keys() else tool


def parse_template_kwargs(value: Any, column: str) -> dict[str, Any] | None:
    """Parses the variables of a row for its chat template, a dictionary or JSON of one; None if it has none.

    Raises:
        BadRow: The value is something else.
    """
    expected = "expected a dictionary of variables of the chat template"
    if isinstance(value, str):
        value = _decoded(value, column, expected) if value.strip() else None
    _check_surrogates(value, column)
    if value is not None and not isinstance(value, dict):
        raise BadRow(f"column {column!r} {_holds(value)}", f"; {expected}")
    return value or None


def parse_system(value: Any, column: str) -> str | None:
    """Parses the system message of a row; None if it has none.

    Raises:
        BadRow: The value is neither text nor null.
    """
    _check_surrogates(value, column)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"column {column!r} {_holds(value)}", "; expected the text of a system message")
    return value if value and value.strip() else None


def columns_of_encoded_messages(rows: Iterable[dict], columns: Collection[str]) -> frozenset[str]:
    """Finds the columns whose texts are chat messages encoded as JSON, as written by CSV and SQL tools.

    Returns:
        Columns most of whose texts look like it: a single response about chat messages is no reason to parse a column.
    """
    texts, encoded = Counter(), Counter()
    for row in rows:
        for column in columns:
            if isinstance(value := row.get(column), str):
                texts[column] += 1
                encoded[column] += _looks_encoded(value)
    return frozenset(column for column in columns if 2 * encoded[column] > texts[column])


def _looks_encoded(text: str) -> bool:
    keys = ("role" in text and "content" in text) or ("from" in text and "value" in text)
    return text.strip() == "[]" or (bool(_FIRST_KEY.match(text)) and keys)


def _decoded(text: str, column: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"column {column!r} holds broken JSON", f" ({error}); {expected}") from error


def _check_surrogates(value: Any, column: str):
    """Refuses lone surrogates, halves of characters beyond U+FFFF: valid in JSON, but tokenizers cannot encode them."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            parts += part
        elif isinstance(part, str) and not part.isascii() and (surrogate := _SURROGATE.search(part)):
            code = f"U+{ord(surrogate.group()):04X} at character {surrogate.start() + 1}"
            raise BadRow(f"column {column!r} holds half a character, a lone surrogate", f" ({code}); expected text")


def _holds(value: Any) -> str:
    return "is null" if value is None else f"holds {type(value).__name__}"
