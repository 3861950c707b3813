"""Tokenized examples on disk, so that the next start, or the next process, need not tokenize them again.

A dataset is the folder `<HF_DATASETS_CACHE>/qstar_jax/<key>/`: an Arrow file, which is mapped into memory, and
`complete.json` with its digest. The key is a fingerprint of everything that the examples depend on, so a cache is never
stale. The folder appears under its name when it is complete; of several processes that need it, one makes it.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from qstar_jax.config import DataOptions
from qstar_jax.data.building import Builder, Facts, Track
from qstar_jax.data.reading import RowSource
from qstar_jax.data.table import SCHEMA, ExampleTable
from qstar_jax.errors import InputError

_FORMAT = 1  # of the files
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")  # what rows, texts and tokens come from
# Options on which no example depends.
_UNREAD = ("train", "eval", "train_split", "eval_split", "max_train_rows", "max_eval_rows")
_UNREAD += ("layout", "row_length", "cache", "step_delimiter")
_TABLE, _SEAL = "examples.arrow", "complete.json"
_PIECE = 2**22  # bytes that a thread digests at once


def cache_folder() -> Path:
    """Returns the folder of all caches, in that of the library datasets; it may not exist yet."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser() / "qstar_jax"


def fingerprint(
    rows: RowSource,
    split: str,
    kind: str,
    tokenizer: Any,
    options: DataOptions,
    *,
    vocabulary: int | None = None,
    eos_ids: Collection[int] = (),
) -> str:
    """SHA-256 of everything that tokenized examples depend on; arguments as for `load_examples`.

    Returns:
        The digest of the content of the source, of the tokenizer, of options, versions and of this code.
    """
    templates = json.dumps(tokenizer.chat_template)
    if options.chat_template is not None and (file := Path(options.chat_template).expanduser()).is_file():
        templates += file.read_text(encoding="utf-8", errors="replace")
    prints_date = "strftime_now" in templates
    parts = {
        "format": _FORMAT,
        "code": _digest_files(sorted(Path(__file__).parent.glob("*.py"))),
        "versions": {name: version(name) for name in _LIBRARIES},
        "content": list(rows) if rows.files is None else _digest_files(rows.files),
        "rows": [split, kind, rows.limit],
        "options": {name: value for name, value in asdict(options).items() if name not in _UNREAD},
        "templates": templates,
        "date": datetime.now().date().isoformat() if prints_date and options.date is None else None,
        "tokenizer": _tokenizer_rules(tokenizer),
        "model": [vocabulary, sorted(eos_ids)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_rules(tokenizer: Any) -> list[Any]:
    """Returns all that maps texts to tokens."""
    if not tokenizer.is_fast:  # is refused later
        return []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # states that each call sets
    backend.no_padding()
    rules = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return [type(tokenizer).__name__, rules, tokenizer.special_tokens_map, bool(tokenizer.split_special_tokens)]


def _digest_files(files: Iterable[Path]) -> list[list[str]]:
    """Returns the name and the SHA-256 of files, piece by piece."""
    sizes = {file: file.stat().st_size for file in files}
    pieces = [(file, start) for file, size in sizes.items() for start in range(0, max(size, 1), _PIECE)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        digests = list(pool.map(_digest_piece, pieces))
    by_file = {file: hashlib.sha256() for file in sizes}
    for (file, _), digest in zip(pieces, digests, strict=True):
        by_file[file].update(digest)
    return [[file.name, digest.hexdigest()] for file, digest in by_file.items()]


def _digest_piece(piece: tuple[Path, int]) -> bytes:
    path, start = piece
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(_PIECE)).digest()


class ExampleCache:
    """The tokenized examples of one fingerprint.

    Args:
        key: The fingerprint.

    Attributes:
        path: Folder that holds them.
    """

    def __init__(self, key: str):
        self.path, self._key = cache_folder() / key, key

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Waits until no other process makes these examples; where files cannot be locked, several may make them.

        Raises:
            InputError: The folder cannot be written.
        """
        from filelock import FileLock

        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            for unfinished in self.path.parent.glob(f".{self._key}.*"):  # of processes that were stopped
                shutil.rmtree(unfinished, ignore_errors=True)
        except NotImplementedError:  # a file system without locks
            pass
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    def read(self) -> tuple[ExampleTable, Facts] | str | None:
        """Maps the examples into memory.

        Returns:
            The examples, and what is known of them; None if there are none; or what is damaged.
        """
        if not self.path.exists():
            return None
        try:
            content = json.loads((self.path / _SEAL).read_text(encoding="utf-8"))
            if content["table"] != _digest_files([self.path / _TABLE]):
                return f"{self.path / _TABLE} differs from its digest"
            return self._open(Facts.from_json(content["facts"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            return f"{self.path} cannot be read ({type(error).__name__}: {error})"

    def write(self, builder: Builder, track: Track) -> tuple[ExampleTable, Facts]:
        """Makes the examples batch by batch, writes them, and maps them into memory.

        Raises:
            InputError: The folder cannot be written, or `builder` refuses the rows.
        """
        unfinished = self.path.with_name(f".{self._key}.{uuid.uuid4().hex}")
        try:
            unfinished.mkdir(parents=True)
            with (unfinished / _TABLE).open("xb") as file:
                with pa.ipc.new_file(file, SCHEMA) as writer:
                    for batch in builder.batches(track):
                        writer.write_batch(batch)
                file.flush()
                os.fsync(file.fileno())
            content = {"table": _digest_files([unfinished / _TABLE]), "facts": builder.facts.to_json()}
            (unfinished / _SEAL).write_text(json.dumps(content), encoding="utf-8")
            if isinstance(self.read(), str):  # it is damaged
                shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # without locks, another process may have been faster
                unfinished.rename(self.path)
            return self._open(builder.facts)
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _open(self, facts: Facts) -> tuple[ExampleTable, Facts]:
        with pa.memory_map(str(self.path / _TABLE)) as file:
            reader = pa.ipc.open_file(file)
            if reader.schema != SCHEMA:
                raise ValueError("its columns are not those of examples")
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        return ExampleTable(batches, facts.identity), facts

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"tokenized examples cannot be kept in {self.path.parent} ({error}); choose another folder with the "
            "environment variable HF_DATASETS_CACHE, or keep none with --data.cache false"
        )
