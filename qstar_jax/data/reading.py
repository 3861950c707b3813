"""Rows of a JSON-lines file, a Parquet file or a data set on the hub, as dictionaries. Pickles are never loaded."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from qstar_jax.errors import InputError
from qstar_jax.tiny_tldr import BUILTIN, SPLITS, builtin_seed, split_rows

_ACCEPTED = (
    f".jsonl, .json (one object a line; both also .gz), .parquet, a data-set name on the Hugging Face hub, or {BUILTIN}"
)
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin"}


def read_rows(source: str, split: str, limit: int | None = None) -> list[dict]:
    """Reads examples as dictionaries, one a row, in file order.

    Args:
        source: Path of a .jsonl, .json, .jsonl.gz, .json.gz or .parquet file, a data-set name on the hub, or
            builtin:tiny-tldr (builtin:tiny-tldr?seed=3: other posts).
        split: Split to take when `source` is a hub name or built in; files have none.
        limit: Read the first so many rows only.

    Returns:
        At least one row.

    Raises:
        InputError: The source does not exist, is of another kind, holds no rows, or a row of it is no JSON object.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{source}: cannot take the first {limit} rows; expected a positive number of rows, or none")
    if not source:
        raise InputError(f"no data named; set --data.train or --data.eval to {_ACCEPTED}")
    if source.startswith("builtin:"):
        return _builtin_rows(source, split, limit)
    path = Path(source).expanduser()
    suffix = _suffix(path)
    if suffix in _PICKLES:
        raise InputError(f"{source}: pickles are never loaded, as they can run code; accepted: {_ACCEPTED}")
    if path.is_dir():
        raise InputError(f"{source} is a folder; name a file in it (accepted: {_ACCEPTED})")
    if not path.exists():
        rows = _hub_rows(source, split, limit) if _is_hub_name(source) else _missing(source)
    elif suffix in (".jsonl", ".json"):
        rows = list(islice(_json_lines(path, source), limit))
    elif path.suffix.lower() == ".parquet":
        rows = list(islice(_parquet_rows(path, source), limit))
    else:
        raise InputError(f"{source}: cannot read {path.suffix or 'a file without a suffix'}; accepted: {_ACCEPTED}")
    if not rows:
        raise InputError(f"{source}: no rows; the file or split is empty")
    return rows


def _builtin_rows(source: str, split: str, limit: int | None) -> list[dict]:
    seed = builtin_seed(source)
    if seed is None:
        raise InputError(f"{source}: no such built-in data; expected {BUILTIN}, or {BUILTIN}?seed=3 for other posts")
    if split not in SPLITS:
        raise InputError(f"{source} has no split {split!r}; expected one of {', '.join(SPLITS)}")
    return split_rows(split, seed, limit)


def _suffix(path: Path) -> str:
    """The suffix in lower case, that of the content for a .gz file."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _is_hub_name(source: str) -> bool:
    """Whether a source that is no path here can be `owner/name` or `name`: "v1.0" is part of a name, ".csv" is not."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)) and not re.search(r"\.[a-zA-Z]\w*$", source)


def _missing(source: str) -> list[dict]:
    raise InputError(f"{source}: no such file; accepted: {_ACCEPTED}")


def _json_lines(path: Path, source: str) -> Iterator[dict]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        lines = enumerate(file, start=1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{source}: cannot be read to its end ({error})") from error
            if line.strip():
                yield _json_object(line, f"{source} line {number}")


def _json_object(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:  # broken JSON and broken UTF-8 alike
        raise InputError(f"{where}: not valid JSON ({error}); expected one JSON object a line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: found a JSON {type(row).__name__}; expected one JSON object a line")
    return row


def _parquet_rows(path: Path, source: str) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source}: not a readable Parquet file ({error})") from error


def _hub_rows(source: str, split: str, limit: int | None) -> list[dict]:
    try:
        import datasets

        rows = datasets.load_dataset(source, split=split)
        return rows.select(range(min(limit, len(rows)))).to_list() if limit else rows.to_list()
    except Exception as error:  # the hub client fails in many ways, and each means that there is no data
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{source!r} is neither a file here nor a data set that could be loaded from the hub, "
            f"split {split!r} ({reason})"
        ) from error
