"""Reads rows of JSON files: one object per line, or one array of objects."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from qstar_jax.data.dropped import BadRow
from qstar_jax.data.lines import MAX_ROW, numbered_lines, pieces
from qstar_jax.errors import InputError
from qstar_jax.untrusted import check_depth, unique_keys

_EXPECTED = "expected one JSON object per line"
_BLANK = re.compile(r"[ \t\n\r]*")
_BLOCK = 2**20  # characters of an array that are parsed at a time


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
    lines = numbered_lines(path, source)
    first = list(islice(lines, 2))
    if not first:
        return
    line = first[0][1]
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{source} is UTF-16; expected UTF-8 (iconv -f UTF-16 -t UTF-8)")
    if line.lstrip().startswith(b"[") and not (len(first) > 1 and _is_json(line)):
        yield from _array_rows(path, source)
    else:
        yield from _line_rows(chain(first, lines))


def _line_rows(lines: Iterable[tuple[int, bytes]]) -> Iterator[dict | BadRow]:
    for number, line in lines:
        try:
            yield _checked_object(_parse(line, f" in line {number}"), f" in line {number}")
        except BadRow as error:
            yield error


def _array_rows(path: Path, source: str) -> Iterator[dict | BadRow]:
    """Yields the items of a file that holds one array."""
    items = _array_items(_blocks(path, source))
    for number in count(1):
        try:
            row = next(items)
        except StopIteration:
            return
        except (ValueError, RecursionError) as error:
            kind = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else "not valid JSON"
            reason = getattr(error, "msg", error)  # without positions, which count from where a block begins
            raise InputError(
                f"{source} begins with '[' but is not a JSON array: {kind} ({reason}, at item {number}); {_EXPECTED}, "
                "or one array"
            ) from error
        try:
            yield _checked_object(row, "")
        except BadRow as error:
            yield error


def _blocks(path: Path, source: str) -> Iterator[str]:
    """Yields the text of a file block by block."""
    decoder, block, size = codecs.getincrementaldecoder("utf-8-sig")(), [], 0
    for piece in pieces(path, source):
        block.append(piece)
        size += len(piece)
        if size >= _BLOCK:
            yield decoder.decode(b"".join(block))
            block, size = [], 0
    yield decoder.decode(b"".join(block), final=True)


def _array_items(blocks: Iterator[str]) -> Iterator[Any]:
    """Yields the items of an array, of which only one needs to be in memory.

    Raises:
        ValueError: It is no valid JSON, or has an item that is longer than a row may be.
    """
    decode = json.JSONDecoder(object_pairs_hook=unique_keys).raw_decode
    text, at = "", 0

    def more() -> bool:
        """Appends a block, drops what has been read, and skips blanks."""
        nonlocal text, at
        block = next(blocks, None)
        text, at = text[at:] + (block or ""), 0
        at = _BLANK.match(text).end()
        return block is not None

    def mark() -> str:
        """Returns the next character; none at the end of the file."""
        nonlocal at
        at = _BLANK.match(text, at).end()
        while at == len(text):
            if not more():
                return ""
        return text[at]

    if mark() != "[":
        raise ValueError("no array")
    at += 1
    is_first = True
    while (character := mark()) != "]":
        if not is_first:
            if character != ",":
                raise ValueError(f"found {character or 'the end of the file'!r} after an item; expected ',' or ']'")
            at += 1
            mark()
        is_first = False
        while True:
            try:
                item, end = decode(text, at)
                if end < len(text):  # else a number may continue
                    break
                error = None
            except (ValueError, RecursionError) as failure:
                error = failure
            if len(text) - at > MAX_ROW:
                raise ValueError(
                    f"an item longer than {MAX_ROW / 2**20:g} MiB, or {getattr(error, 'msg', error) or 'no end'}"
                )
            if not more():
                raise error or ValueError("the array does not end")
        check_depth(item, text[at:end])
        at = end
        yield item
    at += 1
    if mark():
        raise ValueError(f"found {text[at : at + 20]!r} after the array")


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
    if len(text) > MAX_ROW:
        raise BadRow(f"longer than {MAX_ROW / 2**20:g} MiB", f"{where}; {_EXPECTED}, shorter than that")
    try:
        row = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
        check_depth(row, text)
    except UnicodeDecodeError as error:
        raise BadRow("not valid UTF-8", f"{where} ({error}); {_EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow("not valid JSON", f"{where} ({error}); {_EXPECTED}") from error
    return row
