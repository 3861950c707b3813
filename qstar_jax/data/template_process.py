"""Compiles and renders chat templates, which come with models, in a process of their own with limits.

See `template_worker` for what runs there. It is started by the first template, takes a second for that, and ends with
this process.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qstar_jax.errors import InputError

_SECONDS, _MEMORY = 10, 2**30  # of processor time per dialogue, and bytes
_LIMITS = {
    "time": f"needs more than {_SECONDS} s for one dialogue",
    "memory": f"needs more than {_MEMORY >> 30} GiB of memory",
    "output": "makes more than 16 million characters of one dialogue",
}
_FIX = "choose another with --data.chat_template FILE"


class TemplateError(Exception):
    """What a template says of a dialogue that it refuses."""


class _Process:
    """The process, if it runs; requests of several threads wait for each other."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0
        self._known: dict[str, int] = {}  # template -> its number there

    def ask(self, text: str, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a request about a template, and returns the reply.

        Raises:
            InputError: If the template exceeds a limit.
        """
        with self._lock:
            if self._process is None or self._owner != os.getpid():  # a forked process starts its own
                self._start()
            known = text in self._known
            number = self._known.setdefault(text, len(self._known))
            line = json.dumps({**request, "template": number, **({} if known else {"text": text})})
            try:
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()
                reply = self._process.stdout.readline()
            except OSError:
                reply = b""
            except BaseException:  # the reply to an interrupted request must not answer the next one
                self.stop()
                raise
            if reply.endswith(b"\n"):
                return json.loads(reply)
            code = self.stop()
        if code < 0:  # ended by the system
            raise _exceeds("time" if code == -signal.SIGPROF else "memory")
        raise RuntimeError(f"the process that renders chat templates ended with exit code {code}")

    def _start(self):
        command = [
            sys.executable,
            "-P",
            str(Path(__file__).with_name("template_worker.py")),
            str(_SECONDS),
            str(_MEMORY),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
        self._owner, self._known = os.getpid(), {}

    def stop(self) -> int:
        """Ends the process, if one runs, and returns its exit code."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return 0
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            code = process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        return code


_process = _Process()
atexit.register(_process.stop)


def check_template(text: str):
    """Compiles a template.

    Raises:
        InputError: If it is not valid Jinja, or exceeds a limit.
    """
    _ask(text, {"messages": None, "day": None})


def render(
    text: str,
    messages: Sequence[dict[str, Any]],
    tools: list[dict] | None,
    variables: dict[str, Any],
    *,
    day: str | None = None,
    open_turn: bool = False,
    spans: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a dialogue.

    Args:
        text: The template.
        messages: The dialogue, of values that JSON knows.
        tools: JSON schemas of the tools.
        variables: Further variables of the template, such as special tokens.
        day: Date of the template's clock, in ISO format; None: today.
        open_turn: Append the header of the assistant's next turn.
        spans: Find what the template marks as the assistant's.

    Returns:
        The text, and start and end of each span in characters.

    Raises:
        TemplateError: If the template refuses the dialogue.
        InputError: If it is not valid Jinja, or exceeds a limit.
    """
    # As `apply_chat_template` does, which is not called because it would render in this process.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    request = {"messages": messages, "tools": tools, "variables": variables, "day": day}
    reply = _ask(text, {**request, "open_turn": open_turn, "spans": spans})
    return reply["text"], [tuple(span) for span in reply["spans"]]


def _ask(text: str, request: dict[str, Any]) -> dict[str, Any]:
    reply = _process.ask(text, request)
    if "exceeds" in reply:
        raise _exceeds(reply["exceeds"])
    if "invalid" in reply:
        raise InputError(f"the chat template is not valid Jinja ({reply['invalid']})")
    if "refusal" in reply:
        if request["messages"] is None:
            raise InputError(f"the chat template cannot be compiled ({reply['refusal']}); {_FIX}")
        raise TemplateError(reply["refusal"])
    return reply


def _exceeds(limit: str) -> InputError:
    return InputError(f"the chat template {_LIMITS[limit]}; {_FIX}")
