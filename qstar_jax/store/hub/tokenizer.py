"""Tokenizers of Hugging Face folders, in and out, without running any code that a folder may carry."""

import json
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from qstar_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG = "tokenizer_config.json"
_OF_THIS_LOAD = ("backend", "is_local", "local_files_only")  # what transformers 5 notes of how it read the folder


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a folder; code that a folder may carry is never run.

    Raises:
        InputError: If there is none that transformers can read without running code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types here; the user needs the folder's name
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{folder}: no usable tokenizer; expected tokenizer.json beside config.json "
            f"({type(error).__name__}: {reason})"
        ) from error


def write_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerBase"):
    """Writes a tokenizer with all its chat templates, so that transformers 4 and 5 read the same from it.

    The classes of single models mend what tokenizer.json says, each version in its own way: what transformers 5 reads
    as LlamaTokenizer gives other tokens once it is saved and read again. The general class takes the file as it is.

    Args:
        folder: A folder that is there.
        tokenizer: The tokenizer.
    """
    tokenizer.save_pretrained(folder)
    path = folder / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in _OF_THIS_LOAD}
    if tokenizer.is_fast:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # both versions know it by this name
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects a dictionary under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_files(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Returns the texts of the files that rebuild a (fast) tokenizer, by their paths in its folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder, tokenizer)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def build_tokenizer(files: dict[str, str]) -> "PreTrainedTokenizerBase":
    """Builds a tokenizer from what `tokenizer_files` returned; files may come from a stranger.

    Raises:
        InputError: If a path leads out of the folder, or the files are no tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise InputError(f"a checkpoint's tokenizer has a file {name!r}; expected paths inside its folder")
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_text(text, encoding="utf-8")
        return read_tokenizer(Path(folder))
