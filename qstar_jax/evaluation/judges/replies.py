"""Replies of a language model, kept on disk, so that none is paid for twice."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from qstar_jax.errors import InputError

Messages = Sequence[dict[str, str]]  # each with role and content


@dataclass(frozen=True)
class Reply:
    """The reply of a model.

    Args:
        text: Its words; maybe none.
        tokens_in: Tokens of the question, as the server counts them; None if it does not report them.
        tokens_out: The same of the reply.
    """

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None


def reply_key(model: str, address: str, messages: Messages, parameters: dict[str, Any], attempt: int) -> str:
    """Returns the SHA-256 of everything that decides a model's reply."""
    everything = [model, address, list(messages), parameters, attempt]
    return sha256(json.dumps(everything, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class ReplyCache:
    """Replies by key; a context manager while new ones are written. Reading changes nothing.

    Lines are only ever appended. One that a killed process left half-written is passed over, at the cost of one call.

    Args:
        folder: Holds replies.jsonl, and is made when the first reply is written; None keeps replies in memory only.
    """

    def __init__(self, folder: Path | None):
        self.path = None if folder is None else folder / "replies.jsonl"
        self._replies: dict[str, Reply] = {}
        self._broken = False
        self._file = None
        if self.path is not None and self.path.exists():
            self._read()

    def _read(self):
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: the judge's replies cannot be read ({error}); see judge.cache") from error
        self._broken = bool(content) and not content.endswith(b"\n")
        for line in content.splitlines():
            try:
                record = json.loads(line)
                self._replies[record["key"]] = Reply(record["reply"], record["tokens_in"], record["tokens_out"])
            except (ValueError, TypeError, KeyError):
                continue

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        """Returns the reply, if it is kept."""
        return self._replies.get(key)

    def __enter__(self) -> "ReplyCache":
        """Opens the file, so that a folder that cannot be written is known before anything is paid for."""
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab")
            except OSError as error:
                raise InputError(f"{self.path} cannot be written ({error}); name a folder by judge.cache") from error
        return self

    def __exit__(self, *_):
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def put(self, key: str, reply: Reply, model: str):
        """Keeps a reply; it is on its way to the disk when this returns. `model` is for people who read the file."""
        self._replies[key] = reply
        if self._file is None:
            return
        record = {"key": key, "model": model, "reply": reply.text}
        record |= {"tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out}
        line = json.dumps(record, ensure_ascii=True) + "\n"
        self._file.write((b"\n" if self._broken else b"") + line.encode())
        self._file.flush()
        self._broken = False
