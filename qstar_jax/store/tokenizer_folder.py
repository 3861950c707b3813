"""The tokenizer of a run, which all its checkpoints share: the files in `tokenizer/`."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import jax

TOKENIZER = "tokenizer"


def tokenizer_digest(files: Mapping[str, str]) -> str | None:
    """Identifies the files of a tokenizer (path -> text); None without any."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest() if files else None


def write_tokenizer_folder(run: Path, files: Mapping[str, str]):
    """Writes the files of a tokenizer (path -> text) into a run's folder, unless they are there; one process does."""
    folder = run / TOKENIZER
    if jax.process_index() != 0 or not files or read_tokenizer_folder(run) == dict(files):
        return
    # Under another name first: a folder that is there, is whole.
    temporary = run / f".{TOKENIZER}.{uuid.uuid4().hex}.tmp"
    for name, text in files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def read_tokenizer_folder(run: Path) -> dict[str, str]:
    """Reads what `write_tokenizer_folder` wrote; files that are no text are left out."""
    folder, files = run / TOKENIZER, {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            try:
                files[path.relative_to(folder).as_posix()] = path.read_bytes().decode("utf-8", "surrogatepass")
            except ValueError:
                continue
    return files
