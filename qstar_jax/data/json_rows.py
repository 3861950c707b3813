"""Reads rows of JSON files: one object per line, or one array of objects."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from qstar_jax.data.dropped import BadRow
from qstar_jax.errors import InputError

_EXPECTED = "expected one JSON object per line"


def json_rows(path: Path, source: str) -> Iterator[dict | BadRow]:
    """Reads the rows of a file, plain or compressed.

    Args:
        path: An existing file, compressed if its name ends with .gz.
        source: The user's name for it, for errors.

    Yields:
        Each row, or what is wrong with it. Blank lines are not rows.

    Raises:
        InputError: The file cannot be read to its end, is not UTF-8, or is a broken array.
    """
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        lines = _numbered_lines(file, source)
        number, line = next(lines, (0, b""))
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{source} is UTF-16; expected UTF-8 (iconv -f UTF-16 -t UTF-8)")
        if number:
            lines = chain([(number, line)], lines)
        if line.lstrip().startswith(b"["):
            yield from _array_rows(list(lines), source)
        else:
            yield from _line_rows(lines)


def _numbered_lines(file: Iterable[bytes], source: str) -> Iterator[tuple[int, bytes]]:
    """Yields lines that are not blank with their numbers from 1, without byte order marks."""
    try:
        for number, line in enumerate(file, start=1):
            if (line := line.removeprefix(codecs.BOM_UTF8)).strip():
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{source}: cannot be read to the end ({error})") from error


def _line_rows(lines: Iterable[tuple[int, bytes]]) -> Iterator[dict | BadRow]:
    for number, line in lines:
        try:
            yield _checked_object(_parse(line, f" in line {number}"), f" in line {number}")
        except BadRow as error:
            yield error


def _array_rows(lines: list[tuple[int, bytes]], source: str) -> Iterator[dict | BadRow]:
    """Yields the rows of a file that begins with '[': the items of one array, or lines that each hold JSON."""
    try:
        items = _parse(b"".join(line for _, line in lines), "")
    except BadRow as error:
        if _is_json(lines[0][1]):
            yield from _line_rows(lines)
            return
        raise InputError(f"{source} begins with '[' but is not a JSON array: {error.fault}, or one array") from error
    for item in items:
        try:
            yield _checked_object(item, "")
        except BadRow as error:
            yield error


def _is_json(line: bytes) -> bool:
    try:
        _parse(line, "")
    except BadRow:
        return False
    return True


def _checked_object(row: Any, where: str) -> dict:
    if not isinstance(row, dict):
        raise BadRow("not a JSON object", f"{where}: found {json.dumps(row)[:40]}; {_EXPECTED}")
    return row


def _parse(text: bytes, where: str) -> Any:
    """Parses JSON; accepts NaN and Infinity, which Python writes and which are harmless in unused columns."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise BadRow("not valid UTF-8", f"{where} ({error}); {_EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow("not valid JSON", f"{where} ({error}); {_EXPECTED}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return row
