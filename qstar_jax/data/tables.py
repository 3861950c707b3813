"""Reads rows of tables: CSV, Parquet, Arrow, and datasets that the library of that name has saved or fetches."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qstar_jax.data.dropped import BadRow
from qstar_jax.data.lines import MAX_ROW, pieces
from qstar_jax.errors import InputError

_ROWS = 1024  # rows of a batch
_LONGEST_NAME = 64  # characters


def csv_rows(path: Path, source: str) -> Iterator[dict | BadRow]:
    """Reads the rows of a table in text, whose first line names the columns; all values are text.

    Args:
        path: An existing file: separated by tabs if its name ends with .tsv (or .tsv.gz), else by commas.
        source: The user's name for it, for errors.

    Yields:
        Each row, or what is wrong with it. Blank lines are not rows.

    Raises:
        InputError: The file is not UTF-8, cannot be read to its end, or has no usable header.
    """
    separator = "\t" if ".tsv" in path.name.lower() else ","
    csv.field_size_limit(MAX_ROW)
    lines = csv.reader(_text_lines(path, source), delimiter=separator, strict=True)
    header = None
    while True:
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow("not valid CSV", f" in line {lines.line_num} ({error}); expected quotes to be doubled")
            continue
        if not cells:
            continue
        if header is None:
            header = _checked_header(cells, separator, source)
        elif len(cells) == len(header):
            yield dict(zip(header, cells, strict=True))
        else:
            more = f" in line {lines.line_num}: {len(cells)} values, and the header names {len(header)} columns"
            yield BadRow("another number of values than columns", f"{more}; quote values that hold separators")


def _text_lines(path: Path, source: str) -> Iterator[str]:
    """Decodes the lines of a file, without a byte order mark."""
    try:
        for number, line in enumerate(pieces(path, source)):
            if len(line) > MAX_ROW:
                raise InputError(f"{source}: line {number + 1} is longer than {MAX_ROW / 2**20:g} MiB; expected rows")
            yield line.decode("utf-8-sig" if number == 0 else "utf-8")
    except UnicodeDecodeError as error:
        wide = error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
        encoding = "UTF-16" if wide else "WINDOWS-1252"
        raise InputError(f"{source}: not UTF-8 ({error}); convert it: iconv -f {encoding} -t UTF-8") from error


def _checked_header(names: list[str], separator: str, source: str) -> list[str]:
    _check_unique(names, source)
    other = next((mark for mark in (",", ";", "\t", "|") if mark != separator and mark in names[0]), None)
    if len(names) == 1 and other:
        raise InputError(
            f"{source}: the header {names[0][:_LONGEST_NAME]!r} has no {separator!r} but {other!r}; expected columns "
            "separated by commas (.csv) or tabs (.tsv)"
        )
    # The first column may have no name: it is the index of a table that pandas wrote.
    for name in names[1:] if len(names) > 1 else names:
        if not name.strip() or len(name) > _LONGEST_NAME or "\n" in name or _is_number(name):
            raise InputError(
                f"{source}: the first line is no header: {name[:_LONGEST_NAME]!r} cannot be the name of a column; "
                "expected names such as prompt,chosen,rejected"
            )
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_unique(names: list[str], source: str):
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{source}: several columns are called {min(duplicates)!r}; expected unique names")


def parquet_rows(path: Path, source: str) -> Iterator[dict | BadRow]:
    """Reads the rows of a Parquet file; arguments, results and errors are those of `csv_rows`."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_unique(file.schema_arrow.names, source)
        for batch in file.iter_batches(batch_size=_ROWS):
            yield from _batch_rows(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source}: not a readable Parquet file ({error})") from error


def arrow_rows(path: Path, source: str) -> Iterator[dict | BadRow]:
    """Reads the rows of an Arrow file (IPC, stream or file); arguments, results and errors are those of `csv_rows`."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            _check_unique(reader.schema.names, source)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS):
                    yield from _batch_rows(batch.slice(start, _ROWS))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source}: not a readable Arrow file ({error})") from error


def saved_dataset(folder: Path, split: str, source: str) -> Any:
    """Opens a folder that `save_to_disk` of the library datasets has written, see `dataset_rows`.

    Args:
        folder: The folder, of one dataset or of several splits.
        split: Split to read if there are several.
        source: The user's name for it, for errors.

    Raises:
        InputError: The folder is damaged, or has no such split.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(folder)
    except Exception as error:  # a damaged folder may fail in many ways
        raise InputError(
            f"{source}: not a readable folder of save_to_disk ({type(error).__name__}: {error})"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise InputError(
                f"{source} has no split {split!r}, but {', '.join(dataset)}; choose one with --data.train_split or "
                "--data.eval_split"
            )
        dataset = dataset[split]
    return dataset


def hub_dataset(source: str, name: str | None, split: str) -> Any:
    """Opens a dataset on the Hub, which may not bring code of its own, see `dataset_rows`.

    Args:
        source: Its name.
        name: Its configuration; None: the default, or the only one.
        split: Split to read.

    Raises:
        InputError: It cannot be loaded.
    """
    try:
        import datasets

        return datasets.load_dataset(source, name, split=split)
    except Exception as error:  # the client of the Hub may fail in many ways
        configuration = f", configuration {name!r}" if name else ""
        raise InputError(
            f"{source!r} is neither a local file nor a dataset that could be loaded from the Hub, "
            f"split {split!r}{configuration} ({type(error).__name__}: {error}); --data.name chooses a configuration"
        ) from error


def dataset_rows(dataset: Any) -> Iterator[dict | BadRow]:
    """Reads the rows of a dataset of the library datasets."""
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS):
        yield from _batch_rows(table)


def dataset_files(dataset: Any) -> tuple[Path, ...] | None:
    """Returns the files that hold a dataset, if they hold nothing else."""
    files = tuple(Path(file["filename"]) for file in dataset.cache_files)
    return files or None


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
