"""Arguments of tool calls, which chat templates expect as objects or as JSON text."""

import json
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from qstar_jax.console import one_line
from qstar_jax.data.columns import Messages
from qstar_jax.data.dropped import BadRow
from qstar_jax.errors import InputError

T = TypeVar("T")


def with_either_arguments(messages: Messages, render: Callable[[Messages], T]) -> T:
    """Renders messages with the arguments of tool calls as most templates expect them, or else as text (DeepSeek-V3).

    Raises:
        BadRow: The template refuses both.
        InputError: The template cannot be used at all.
    """
    problems = []
    for form in ("object", "text"):
        try:
            return render(_with_call_arguments(messages, form))
        except InputError:  # the fault of the template, not of the messages
            raise
        except Exception as error:  # a template is a program, which can fail in many ways
            problems.append(error)
    raise BadRow(f"the chat template refuses the messages ({one_line(str(problems[0]))})") from problems[0]


def _with_call_arguments(messages: Messages, form: Literal["object", "text"]) -> Messages:
    """Returns messages whose tool calls have their arguments in one form; text that is no JSON stays as it is."""

    def convert(arguments: Any) -> Any:
        if form == "text":
            return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        try:
            return json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            return arguments

    def convert_call(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if "function" in call:
            return call | {"function": convert_call(call["function"])}
        return call | {"arguments": convert(call["arguments"])} if "arguments" in call else call

    return [
        message | {"tool_calls": list(map(convert_call, message["tool_calls"]))}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
