"""Where options say that files lie: on this machine. Addresses elsewhere are refused, or they would be folder names."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from qstar_jax.errors import InputError

# Options that name a file or a folder, or what may be one.
PLACES = (
    "model",
    "out",
    "reference",
    "base",
    "pairs.tuned",
    "pairs.untuned",
    "data.train",
    "data.eval",
    "data.chat_template",
    "reference.cache",
    "judge.model",
    "judge.reference",
    "judge.prompt",
    "judge.cache",
    "credit",
    "sweep",
    "decline",
    "with_sft",
    "without_sft",
)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/.*", re.DOTALL)  # two letters at least: C:/ is a drive


def check_places(options: Any):
    """Refuses addresses such as gs://bucket/run where a path is taken.

    Args:
        options: Options of a verb.

    Raises:
        InputError: If an option of `PLACES` is one.
    """
    for name, value in _texts(options):
        if name in PLACES and _ADDRESS.fullmatch(value):
            scheme = value.partition(":")[0]
            raise InputError(
                f"--{name} {value}: expected a path on this machine (or a hub name, where models and data are read), "
                f"and {scheme}:// addresses are not opened yet; copy or mount it and give that path"
            )


def _texts(options: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and value of each text among options; members of a list share the name of the list."""
    if isinstance(options, str):
        yield name, options
    elif isinstance(options, list | tuple):
        for member in options:
            yield from _texts(member, name)
    elif is_dataclass(options):
        for field in fields(options):
            yield from _texts(getattr(options, field.name), f"{name}.{field.name}" if name else field.name)
