"""What errors say, in the words of Python: arguments instead of options of the command line and temporary files."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from qstar_jax.errors import InputError

_LITERALS = {"null": "None", "true": "True", "false": "False"}


@contextmanager
def in_python(config: Any, files: Mapping[str, str], arguments: Mapping[str, str]) -> Iterator[None]:
    """Puts what an InputError says of options and files into the words of Python.

    Args:
        config: The options, by blocks.
        files: Files that hold rows given in Python -> the arguments that gave them.
        arguments: Options -> arguments of another name.
    """
    try:
        yield
    except InputError as error:
        raise InputError(_arguments_of(_rows_of(str(error), files), config, arguments)) from error


def _rows_of(message: str, files: Mapping[str, str]) -> str:
    """Names rows as entries of a list, which count from 0: `FILE row 2` becomes `pairs[1]`."""
    for file, argument in files.items():
        if file not in message:
            continue
        message = re.sub(rf"{re.escape(file)} (?=row \d)", "", message).replace(file, argument)
        message = re.sub(
            r"\brow (\d+(?:, \d+)*)",
            lambda found, name=argument: ", ".join(f"{name}[{int(row) - 1}]" for row in found[1].split(", ")),
            message,
        )
        message = message.replace("no column", "no key").replace("rows or remove them from the file", "rows")
    return message


def _arguments_of(message: str, config: Any, arguments: Mapping[str, str]) -> str:
    """Names options as arguments: `--loss.name simpo` becomes `loss='simpo'`."""
    blocks = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    defaults = {
        (block, entry.name): getattr(value, entry.name)
        for block, value in blocks.items()
        if is_dataclass(value)
        for entry in fields(value)
    }
    names = [name for _, name in defaults]

    def argument(found: re.Match) -> str:
        dashes, block, name, value = found.groups()
        if (block, name) not in defaults:
            return found[0]
        short = name if names.count(name) == 1 else f"{block}__{name}"
        short = block if name == "name" and block != "data" else arguments.get(f"{block}.{name}", short)
        if not dashes:
            return f"{short} {value}" if value else short
        if value is not None:
            return f"{short}={_LITERALS.get(value, repr(value))}"
        if isinstance(defaults[block, name], bool):
            return f"{short}=True"
        return short if message[found.end() :].startswith(" ") else f"{short}=..."

    # A word is the value of an option only where nothing but a new clause follows. Dots in paths are no options.
    return re.sub(r"(?<![\w./-])(--)?([a-z]+)\.([a-z_]+)(?!\w|\.\w)(?: (\w+)(?=[,;.)]|$))?", argument, message)
