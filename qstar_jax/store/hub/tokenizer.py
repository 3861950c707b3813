"""Reads and writes the tokenizers of Hugging Face folders, without running any code in them."""

import json
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from qstar_jax.errors import InputError
from qstar_jax.untrusted import check_regular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG = "tokenizer_config.json"
_SUFFIXES = (".json", ".jinja", ".txt", ".model")  # of files that transformers may open
_LOAD_NOTES = ("backend", "is_local", "local_files_only")  # transformers 5 records how it loaded the tokenizer


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a folder; code in the folder is never run.

    Raises:
        InputError: If there is none that transformers can load without running code.
    """
    from transformers import AutoTokenizer

    for path in folder.iterdir():
        if path.suffix in _SUFFIXES:
            check_regular(path)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types here
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{folder}: no usable tokenizer; expected tokenizer.json next to config.json "
            f"({type(error).__name__}: {reason})"
        ) from error


def write_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerBase"):
    """Writes a tokenizer with all its chat templates, so that transformers 4 and 5 load the same tokenizer.

    Model-specific classes patch tokenizer.json, differently in each version: a LlamaTokenizer of transformers 5 gives
    other tokens after saving and loading. The general class uses the file unchanged.
    """
    tokenizer.save_pretrained(folder)
    path = folder / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in _LOAD_NOTES}
    if tokenizer.is_fast:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that both versions know
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects a dictionary under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_files(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Returns the texts of the files of a (fast) tokenizer, by their paths in its folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder, tokenizer)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def build_tokenizer(files: dict[str, str]) -> "PreTrainedTokenizerBase":
    """Builds a tokenizer from the result of `tokenizer_files`, which is not trusted.

    Raises:
        InputError: If a path leads out of the folder, or the files are not a tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise InputError(f"a checkpoint's tokenizer has a file {name!r}; expected paths inside its folder")
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_text(text, encoding="utf-8")
        return read_tokenizer(Path(folder))
