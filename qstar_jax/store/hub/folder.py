"""Resolves names on the Hub to local folders, and reads their config.json."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qstar_jax.errors import InputError
from qstar_jax.tasks import find
from qstar_jax.untrusted import read_json

# Files to download from the Hub: text and safetensors, never a pickle (.bin, .pt) and never Python code.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")


def open_folder(model: str, revision: str | None = None, patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    """Resolves a folder or a name on the Hub to a local folder.

    Args:
        model: Path of a folder; a name such as "owner/model", whose files are downloaded into the Hub's cache; or a
            built-in task such as builtin:tiny-tldr, whose base model is part of the package.
        revision: Version of a model on the Hub: a branch, a tag or a commit; None: the newest.
        patterns: Names of the files to download.

    Raises:
        InputError: If it is none of these.
    """
    if built_in := find(model):
        task, seed = built_in
        if seed is not None:
            raise InputError(f"model {model!r}: a base model has no seed; name it {task.source}")
        if task.base is None:
            raise InputError(f"model {model!r}: the task has data but no base model in the package")
        return task.base
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        actual = "a file" if path.exists() else "no such path"
        raise InputError(f"model {model!r}: expected a folder or a name on the Hub (found: {actual})")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the network, the Hub and the name may fail in many ways
        raise InputError(
            f"model {model!r}: no such folder, and no model of that name could be downloaded from the Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        InputError: If it is missing or not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        files = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise InputError(f"{folder}: no config.json, so this is not a Hugging Face model folder (found: {files})")
    return read_json_object(path)


def read_config_of(model: str) -> dict[str, Any]:
    """Reads the config.json of a folder, or of a model on the Hub without downloading anything else.

    Raises:
        InputError: If there is no such model, or its config.json is missing or not JSON.
    """
    return read_config(open_folder(model, patterns=("config.json",)))


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        InputError: If it holds anything else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value
