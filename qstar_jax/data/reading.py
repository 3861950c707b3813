"""Reads rows from JSON files, Parquet files or datasets on the Hub as dictionaries, and never loads pickles."""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from qstar_jax.data.dropped import BadRow
from qstar_jax.data.json_rows import json_rows
from qstar_jax.errors import InputError
from qstar_jax.tasks import TASKS, Task, find

_ACCEPTED = (
    ".jsonl, .json (one object per line, or one array of objects; both also .gz), .parquet, the name of a dataset on "
    f"the Hugging Face Hub, or {', '.join(task.source for task in TASKS)}"
)
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin"}


def read_rows(source: str, split: str, limit: int | None = None) -> list[dict | BadRow]:
    """Reads rows as dictionaries, in file order.

    A row that cannot be read (a broken line, say) keeps its place as a `BadRow`, so that other rows keep their numbers;
    the caller drops or raises it. Blank lines are not rows.

    Args:
        source: Path of a .jsonl, .json, .jsonl.gz, .json.gz or .parquet file, the name of a dataset on the Hub, or
            builtin:tiny-tldr (builtin:tiny-tldr?seed=3: other posts).
        split: Split to read if `source` is on the Hub or built in; files have none.
        limit: Read only the first `limit` rows.

    Raises:
        InputError: The source does not exist, has an unsupported format, is broken as a whole, or is empty.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{source}: cannot read the first {limit} rows; expected a positive number of rows, or none")
    if not source:
        raise InputError(f"no data given; set --data.train or --data.eval to {_ACCEPTED}")
    if built_in := find(source):
        return _builtin_rows(source, *built_in, split, limit)
    path = Path(source).expanduser()
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in _PICKLES:
        raise InputError(f"{source}: pickles are never loaded, as they can run code; accepted: {_ACCEPTED}")
    if path.is_dir():
        raise InputError(f"{source} is a folder; name a file in it (accepted: {_ACCEPTED})")
    if not path.exists():
        if not _is_hub_name(source):
            raise InputError(f"{source}: no such file; accepted: {_ACCEPTED}")
        rows = _hub_rows(source, split, limit)
    elif suffix in (".jsonl", ".json"):
        rows = list(islice(json_rows(path, source), limit))
    elif path.suffix.lower() == ".parquet":
        rows = list(islice(_parquet_rows(path, source), limit))
    else:
        raise InputError(f"{source}: cannot read {path.suffix or 'a file without a suffix'}; accepted: {_ACCEPTED}")
    if not rows:
        raise InputError(f"{source}: no rows; the file or split is empty")
    return rows


def _builtin_rows(source: str, task: Task, seed: int | None, split: str, limit: int | None) -> list[dict]:
    if split not in task.splits:
        raise InputError(f"{source} has no split {split!r}; expected one of {', '.join(task.splits)}")
    return task.rows(split, seed or 0, limit)


def _is_hub_name(source: str) -> bool:
    """Whether a source may be `owner/name` or `name`: "v1.0" can be part of a name, the suffix ".csv" cannot."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)) and not re.search(r"\.[a-zA-Z]\w*$", source)


def _parquet_rows(path: Path, source: str) -> Iterator[dict | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if duplicates := {name for name in names if names.count(name) > 1}:
            raise InputError(f"{source}: several columns are called {min(duplicates)!r}; expected unique names")
        for batch in file.iter_batches(batch_size=1024):
            yield from _batch_rows(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source}: not a readable Parquet file ({error})") from error


def _batch_rows(batch: Any) -> Iterator[dict | BadRow]:
    try:
        yield from map(_without_nulls, batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield BadRow("not valid UTF-8", f" ({error})")
        else:
            for row in range(batch.num_rows):
                yield from _batch_rows(batch.slice(row, 1))


def _without_nulls(row: dict) -> dict:
    """Removes null entries from the structs of a row: columnar files add the keys of all other structs as nulls."""
    return {column: _without_null_entries(value) for column, value in row.items()}


def _without_null_entries(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null_entries(entry) for key, entry in value.items() if entry is not None}
    return [_without_null_entries(item) for item in value] if isinstance(value, list) else value


def _hub_rows(source: str, split: str, limit: int | None) -> list[dict]:
    try:
        import datasets

        rows = datasets.load_dataset(source, split=split)
        rows = rows.select(range(min(limit, len(rows)))) if limit else rows
        return list(map(_without_nulls, rows.to_list()))
    except Exception as error:  # the client of the Hub may fail in many ways
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{source!r} is neither a local file nor a dataset that could be loaded from the Hub, "
            f"split {split!r} ({reason})"
        ) from error
