"""Reads lines of text files, plain or compressed, which may be immense, endless or bombs, in little memory."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qstar_jax.errors import InputError
from qstar_jax.untrusted import open_regular

MAX_ROW = 2**22  # bytes of a row: a million tokens, for which tokenizers need up to a gigabyte
_MAX_BLANK = 2**21  # bytes of blank lines in succession
_MAX_RATIO, _FREE = (
    200,
    2**26,
)  # how far a compressed file may expand (text: 3 to 10), and bytes that it may in any case
_DEFLATE_RATIO = 1032  # no format of gzip expands further
_CHUNK = 2**20


def pieces(path: Path, source: str) -> Iterator[bytes]:
    """Yields the lines of a file, and those longer than `MAX_ROW` in pieces of `MAX_ROW` + 1 bytes.

    Args:
        path: A file, compressed if its name ends with .gz.
        source: The user's name for it, for errors.

    Raises:
        InputError: The file is no regular one, cannot be read to its end, is blank for long, or is a bomb: a compressed
            file that expands to more than 64 MiB and to more than 200 times its size.
    """
    with open_regular(path) as raw:
        try:
            file = _decompressed(raw, path, source) if path.suffix.lower() == ".gz" else raw
            blank = 0
            while piece := file.readline(MAX_ROW + 1):
                blank = 0 if piece.strip() else blank + len(piece)
                if blank > _MAX_BLANK:
                    raise InputError(
                        f"{source}: has {blank / 2**20:.0f} MiB of blank lines in succession; expected rows"
                    )
                yield piece
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{source}: cannot be read to the end ({error})") from error


def _decompressed(raw: BinaryIO, path: Path, source: str) -> gzip.GzipFile:
    """Opens a compressed file, after a pass over it if it could be a bomb: its rows would take hours to be refused."""
    file, size = gzip.GzipFile(fileobj=raw), path.stat().st_size
    most, expanded = max(_FREE, _MAX_RATIO * size), 0
    if size * _DEFLATE_RATIO > most:
        while chunk := file.read(_CHUNK):
            expanded += len(chunk)
            if expanded > most:
                raise InputError(
                    f"{source}: expands to more than {most / size:,.0f} times its size, like a bomb; if it is none, "
                    "decompress it with gunzip and name the plain file"
                )
        file.seek(0)
    return file


def numbered_lines(path: Path, source: str) -> Iterator[tuple[int, bytes]]:
    """Yields lines that are not blank with their numbers from 1, without byte order marks.

    Of a line longer than `MAX_ROW` only the first piece is yielded, which is longer than that too. Arguments and errors
    as for `pieces`.
    """
    number, is_rest = 1, False
    for piece in pieces(path, source):
        if not is_rest and (line := piece.removeprefix(codecs.BOM_UTF8)).strip():
            yield number, line
        is_rest = not piece.endswith(b"\n")
        number += not is_rest
