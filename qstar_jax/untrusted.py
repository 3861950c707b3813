"""Reads files that anybody may have written: regular ones, of limited size and depth, and never runs what they hold."""

import json
import math
import os
import select
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, BinaryIO, TypeVar, get_args, get_origin

from qstar_jax.errors import InputError

MAX_FILE = 2**26  # bytes of a file that is read as a whole; indices of the largest models have a tenth of it
MAX_OPTIONS = 2**20  # bytes of a file of options, which is YAML, whose reader is slow
_MAX_DEPTH = 100  # brackets inside each other; real files have ten, and Python's stack ends at some hundreds
_MAX_VALUES = 100_000  # of a file of options, counted with what its aliases repeat
_MAX_DIGITS = 30
_MAX_WAIT = 30  # seconds for the writer of a pipe
_SHOWN = 40  # characters of a value
_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
_KINDS |= {NoneType: "null"}
T = TypeVar("T")
_OTHER = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))


def check_regular(path: Path):
    """Checks that a path leads to a file, and to no pipe or device, which may be endless or silent for ever.

    Raises:
        InputError: If it leads to something else.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _OTHER if is_kind(mode)), "a device")
        raise InputError(f"{path}: not a file (found: {kind}); expected a regular file")


def open_regular(path: Path) -> BinaryIO:
    """Opens a file.

    Raises:
        InputError: If it is no regular one, or cannot be read.
    """
    check_regular(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_text(path: Path, most: int = MAX_FILE, *, pipes: bool = False) -> str:
    """Reads a text of at most `most` bytes.

    Args:
        path: A regular file.
        most: How many bytes it may have.
        pipes: Whether it may be a pipe too, whose writer has 30 seconds.

    Raises:
        InputError: If it is longer, not UTF-8, or cannot be read.
    """
    if pipes and path.is_fifo():
        content = _read_pipe(path, most + 1)
    else:
        with open_regular(path) as file:
            content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{path}: has more than {most / 2**20:g} MiB; expected a smaller file")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 ({error}); expected text in UTF-8") from error


def _read_pipe(path: Path, most: int) -> bytes:
    content, end = b"", time.monotonic() + _MAX_WAIT
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:  # opens without a writer
        while len(content) < most:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise InputError(f"{path}: a pipe that did not end within {_MAX_WAIT} s; write to it, or name a file")
            chunk = pipe.read(most - len(content))
            if not chunk:
                break
            content += chunk
    return content


def read_json(path: Path) -> Any:
    """Reads a file of JSON.

    Raises:
        InputError: If it is none, repeats a key, or is nested too deeply.
    """
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_int=_whole_number)
        check_depth(value, text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({_reason(error)})") from error
    return value


def read_json_lines(path: Path, parse: Callable[[Any], T], kind: str) -> Iterator[T]:
    """Reads a file of records that the library wrote, one object of JSON per line, and somebody may have changed.

    Args:
        path: A regular file.
        parse: Makes a record of a line's object; raises a KeyError, TypeError, AttributeError or ValueError for others,
            and an InputError for one that is no use.
        kind: What a line is, such as "a generation".

    Raises:
        InputError: If a line is no such record, or holds a number that is not finite.
    """
    with open_regular(path) as file:  # texts may hold what `splitlines` splits at
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(
                    line,
                    object_pairs_hook=unique_keys,
                    parse_int=_whole_number,
                    parse_float=_finite,
                    parse_constant=_finite,
                )
                if not isinstance(record, dict):
                    raise ValueError(f"found {repr(record)[:_SHOWN]}; expected an object")
                yield parse(record)
            except InputError as error:
                raise InputError(f"{path} line {number}: {error}") from error
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                problem = f"no {error}" if isinstance(error, KeyError) else _reason(error)
                raise InputError(f"{path} line {number}: not {kind} ({problem})") from error


def check_types(record: Mapping[str, Any], types: Mapping[str, Any]):
    """Checks that an object of JSON has some keys, with values of their types; true and false are no numbers.

    Args:
        record: The object.
        types: Name -> type of the value: int, float (a whole number is one), str, bool, dict, list, a list of
            one of them, or one of them or None.

    Raises:
        ValueError: If a key is missing, or its value is something else.
    """
    for name, kind in types.items():
        if name not in record:
            raise ValueError(f"no {name}")
        if not _has_type(record[name], kind):
            raise ValueError(f"{name} is {repr(record[name])[:_SHOWN]}; expected {_kind_in_words(kind)}")


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_has_type(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_has_type(entry, get_args(kind)[0]) for entry in value)
    return type(value) in ((int, float) if kind is float else (kind,))


def _kind_in_words(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(map(_kind_in_words, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list, each entry {_kind_in_words(get_args(kind)[0])}"
    return _KINDS[kind]


def read_yaml(path: Path, *, pipes: bool = False) -> Any:
    """Reads a file of YAML with plain values only: no tags of Python, no more values than options can have.

    Args:
        path: A regular file.
        pipes: As for `read_text`.

    Raises:
        InputError: If it holds anything else.
    """
    import yaml

    text = read_text(path, MAX_OPTIONS, pipes=pipes)
    try:
        value = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        check_size(value)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable as YAML ({_reason(error)})") from error
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """Makes an object of JSON; a hook for `json.loads`, which would keep the last of several values.

    Raises:
        ValueError: If a key occurs twice.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return row


def check_depth(value: Any, text: str | bytes):
    """Checks that lists and objects are not nested deeply: what walks through them would end in a full stack.

    Args:
        value: Parsed JSON.
        text: What it was parsed from.

    Raises:
        ValueError: If they are.
    """
    brackets = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, brackets)) <= _MAX_DEPTH:
        return
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [entry for item in level for entry in _entries(item)]
        if not level:
            return
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def check_size(value: Any):
    """Checks that options are not nested deeply, and not too many, counting what aliases of YAML repeat.

    Raises:
        ValueError: If they are.
    """
    level, count = [value], 0
    for _ in range(_MAX_DEPTH):
        following: list[Any] = []
        for item in level:
            following.extend(_entries(item))
            if count + len(following) > _MAX_VALUES:
                raise ValueError(f"more than {_MAX_VALUES:,} values; expected options")
        level, count = following, count + len(following)
        if not level:
            return
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def _entries(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits):,} digits")
    return int(digits)


def _finite(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"found the number {text}; expected finite ones")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested more than {_MAX_DEPTH} deep"
    return " ".join(str(error).split())
