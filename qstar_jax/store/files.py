"""Writes files that appear under their names complete or not at all, and removes folders that stayed empty."""

import json
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any


def write_atomically(file: Path, content: bytes):
    """Writes or replaces a file under a temporary name and renames it, so that readers never see a part of it."""
    # A unique name, because other runs may write the same file; `tempfile` would make it readable by its owner only.
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, value: Any):
    """Writes a value as indented JSON, atomically (see `write_atomically`)."""
    write_atomically(file, json.dumps(value, indent=2).encode() + b"\n")


def missing_folders(folder: Path) -> list[Path]:
    """Lists the folders that `folder.mkdir(parents=True)` would make, the deepest first."""
    return list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))


def remove_empty(folders: Iterable[Path]):
    """Removes those folders that are empty: what is refused leaves nothing behind."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
