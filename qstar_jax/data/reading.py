"""Reads rows from files, folders and the Hub as dictionaries, and never runs code: no pickles, no scripts of data."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qstar_jax.data.dropped import BadRow
from qstar_jax.data.files import files_of_split, is_pattern, is_saved, kind_of, matching_files
from qstar_jax.data.json_rows import json_rows
from qstar_jax.data.tables import (
    arrow_rows,
    csv_rows,
    dataset_files,
    dataset_rows,
    hub_dataset,
    parquet_rows,
    saved_dataset,
)
from qstar_jax.errors import InputError
from qstar_jax.tasks import TASKS, Task, find

_ACCEPTED = (
    ".jsonl, .json (one object per line, or one array of objects), .csv, .tsv (all also .gz), .parquet, .arrow, a "
    "folder or a pattern of such files, a folder of save_to_disk, the name of a dataset on the Hugging Face Hub, "
    f"{', '.join(task.source for task in TASKS)} or reasoning-gym:NAME"
)
_READERS: dict[str, Callable[[Path, str], Iterator[dict | BadRow]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}


@dataclass(frozen=True)
class RowSource(Iterable[dict | BadRow]):
    """The rows of a source in file order, which are read anew whenever they are iterated.

    A row that cannot be read (a broken line, say) keeps its place as a `BadRow`, so that other rows keep their numbers;
    the caller drops or raises it. Blank lines are not rows.

    Attributes:
        start: Begins to read them.
        files: Files that hold them; None if they are made here, such as those of a built-in task.
        limit: Read only the first rows.
    """

    start: Callable[[], Iterable[dict | BadRow]]
    files: tuple[Path, ...] | None
    limit: int | None = None

    def __iter__(self) -> Iterator[dict | BadRow]:
        """Begins an iteration."""
        return islice(self.start(), self.limit)

    @property
    def size(self) -> int:
        """Size of the files in bytes."""
        return sum(file.stat().st_size for file in self.files or ())


def open_rows(source: str, split: str, limit: int | None = None, name: str | None = None) -> RowSource:
    """Finds the rows of a source; arguments and errors as for `read_rows`."""
    if limit is not None and limit < 1:
        raise InputError(f"{source}: cannot read the first {limit} rows; expected a positive number of rows, or none")
    if not source:
        raise InputError(f"no data given; set --data.train or --data.eval to {_ACCEPTED}")
    if built_in := find(source):
        rows = _builtin_rows(source, *built_in, split, limit)
        return RowSource(lambda: rows, None)
    path = Path(os.path.expanduser(source))
    if is_on_hub(source):
        dataset = hub_dataset(source, name, split)
        return RowSource(lambda: dataset_rows(dataset), dataset_files(dataset), limit)
    if os.path.isdir(path) and is_saved(path):
        dataset = saved_dataset(path, split, source)
        return RowSource(lambda: dataset_rows(dataset), dataset_files(dataset), limit)
    files = _files(source, path, split)
    return RowSource(lambda: _file_rows(files, source), tuple(files), limit)


def read_rows(source: str, split: str, limit: int | None = None, name: str | None = None) -> list[dict | BadRow]:
    """Reads all rows as dictionaries, see `RowSource`; files of a folder or a pattern in the order of their names.

    Args:
        source: Path of a file (.jsonl, .json, .csv, .tsv, each also .gz, .parquet, .arrow), a folder or a pattern of
            such files, a folder that `save_to_disk` has written, the name of a dataset on the Hub, or
            builtin:tiny-tldr (builtin:tiny-tldr?seed=3: other posts).
        split: Split to read if `source` is on the Hub, built in, or a folder with splits; files have none.
        limit: Read only the first `limit` rows.
        name: Configuration of a dataset on the Hub; None: the default.

    Raises:
        InputError: The source does not exist, has an unsupported format, is broken as a whole, or is empty.
    """
    rows = list(open_rows(source, split, limit, name))
    check_rows(rows, source)
    return rows


def check_rows(rows: Iterable[dict | BadRow], source: str):
    """Checks that there are rows.

    Raises:
        InputError: There are none.
    """
    if next(iter(rows), None) is None:
        raise InputError(f"{source}: no rows; the file or split is empty")


def is_on_hub(source: str) -> bool:
    """Whether a source names a dataset on the Hub: no file here, and `owner/name` or `name`.

    "v1.0" can be part of a name, the suffix ".csv" cannot.
    """
    is_name = re.fullmatch(r"\w[\w.-]{,95}(/\w[\w.-]{,95})?", source) and not re.search(r"\.[a-zA-Z]\w*$", source)
    return bool(is_name) and not os.path.exists(source)


def _builtin_rows(source: str, task: Task, seed: int | None, split: str, limit: int | None) -> list[dict]:
    if split not in task.splits:
        raise InputError(f"{source} has no split {split!r}; expected one of {', '.join(task.splits)}")
    return task.rows(split, seed or 0, limit)


def _files(source: str, path: Path, split: str) -> list[Path]:
    """Lists the files that a source names, which can be read; a path that exists is never a pattern."""
    if os.path.isdir(path):
        return files_of_split(path, split, _ACCEPTED)
    if is_pattern(source) and not os.path.exists(path):
        return matching_files(source, _ACCEPTED)
    kind_of(path, _ACCEPTED)
    return [path]


def _file_rows(files: Sequence[Path], source: str) -> Iterator[dict | BadRow]:
    """Yields the rows of files, one after the other; where there are several, faults name the file."""
    for path in files:
        read = _READERS[kind_of(path, _ACCEPTED)]
        if len(files) == 1:
            yield from read(path, source)
            continue
        for row in read(path, str(path)):
            is_bad = isinstance(row, BadRow)
            yield BadRow(str(row), f"{row.fault.removeprefix(str(row))}, in {path.name}") if is_bad else row
