"""Finds the files that a source names: one file, those of a folder, or those that a pattern matches."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from qstar_jax.errors import InputError
from qstar_jax.untrusted import open_regular

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_TEXTS = (".jsonl", ".json", ".csv", ".tsv")  # which may be compressed
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin"}
_NO_DATA = {"", ".md", ".txt", ".py", ".yaml", ".yml"}  # what stands beside data: a licence, a card, a script
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLITS = re.compile(r"(train|test|eval|valid|val|dev)(ing|idation|uation|elopment)?")
_MOST = 100_000  # entries of a folder and below: with more it is no folder of data, such as /
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def kind_of(path: Path, accepted: str) -> str:
    """Returns the kind of a file by its name: one of `KINDS`.

    Args:
        path: A file.
        accepted: What is accepted, for errors.

    Raises:
        InputError: It does not exist, is a pickle, of no kind that can be read, or its reader may not open it.
    """
    suffix = _suffix(path)
    if suffix in _PICKLES:
        raise InputError(f"{path}: pickles are never loaded, as they can run code; accepted: {accepted}")
    if not os.path.exists(path):  # unlike Path.exists it knows that a name may be too long for any file
        raise InputError(f"{path}: no such file; accepted: {accepted}")
    compressed = path.suffix.lower() == ".gz"
    open_regular(path).close()
    if suffix not in (_TEXTS if compressed else KINDS):
        raise InputError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; accepted: {accepted}")
    return suffix


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the library datasets."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def is_pattern(source: str) -> bool:
    """Whether a source is a pattern such as data/*.jsonl."""
    return glob.has_magic(source)


def matching_files(pattern: str, accepted: str) -> list[Path]:
    """Lists the files that a pattern matches (`**` spans folders), in the order of their names.

    Raises:
        InputError: There are none, or they are of several kinds.
    """
    matches = [Path(match) for match in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    files = [match for match in matches if match.is_file()]
    if not files:
        what = f"matches only folders ({matches[0]}, ...)" if matches else "matches no file"
        raise InputError(f"{pattern} {what}; accepted: {accepted}")
    return _of_one_kind(files, pattern, accepted)


def files_of_split(folder: Path, split: str, accepted: str) -> list[Path]:
    """Lists the data files in a folder and below, in the order of their names.

    If they are named after splits, as in repositories of the Hub (train.jsonl, test-00000-of-00002.parquet,
    train/0.csv), those of `split` are listed.

    Raises:
        InputError: There are none, they are of several kinds, it is not clear which are meant, or a folder cannot be
            read or holds more than any data.
    """
    files = [path for path in _files_below(folder) if path.name not in _METADATA and _suffix(path) not in _NO_DATA]
    if not files:
        raise InputError(f"{folder}: the folder holds no data; accepted: {accepted}")
    # Select the files of the split, if names tell splits.
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    names = sorted({name for name in splits.values() if name})
    if names:
        files = [path for path in files if splits[path] == split]
        if not files:
            raise InputError(
                f"{folder} has no files of the split {split!r}, but of {', '.join(names)}; choose one with "
                "--data.train_split or --data.eval_split, or name files by a pattern such as FOLDER/*.jsonl"
            )
    # Files that lie apart may be different data, such as configurations of a dataset.
    parents = sorted({str(path.parent) for path in files})
    if len(parents) > 1:
        raise InputError(f"{folder}: data lie in several folders ({', '.join(parents)}); name one of them")
    return _of_one_kind(files, str(folder), accepted)


def _files_below(folder: Path) -> list[Path]:
    """Lists all that is no folder, in the order of names, but what is hidden."""

    def refuse(error: OSError):
        raise InputError(
            f"{folder}: the folder {error.filename} cannot be read ({error.strerror}); expected a folder of data that "
            "can be read, or a pattern such as FOLDER/*.jsonl"
        ) from error

    files, seen = [], 0
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
        seen += len(folders) + len(names)
        if seen > _MOST:
            raise InputError(
                f"{folder}: holds more than {_MOST:,} files and folders; expected a folder of data, or a pattern such "
                "as FOLDER/*.jsonl"
            )
    return sorted(files)


def _of_one_kind(files: Sequence[Path], source: str, accepted: str) -> list[Path]:
    kinds = sorted({kind_of(path, accepted) for path in files})
    if len(kinds) > 1:
        raise InputError(
            f"{source}: files of several kinds ({', '.join(kinds)}); name those of one kind by a pattern such as "
            f"FOLDER/*{kinds[0]}"
        )
    return list(files)


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _split_of(path: Path) -> str | None:
    """Returns the split that a file is named after, if any: by its shard, its own name or that of its folder."""
    stem = path.name.split(".")[0]
    if shard := _SHARD.fullmatch(stem):
        return shard[1]
    return next((name for name in (stem, *reversed(path.parent.parts)) if _SPLITS.fullmatch(name)), None)
