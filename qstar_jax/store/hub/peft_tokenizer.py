"""The tokenizer of an adapter: files in its own folder take precedence over those of the base."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from qstar_jax.errors import InputError
from qstar_jax.store.hub.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG, _TEMPLATE, _TEMPLATES = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PARTS = (*_VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json")


def read_adapter_tokenizer(folder: Path, base: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Reads the tokenizer with which an adapter was trained.

    Args:
        folder: Folder of the adapter, with a whole tokenizer, only chat templates, or neither.
        base: Tokenizer of the base.

    Returns:
        The tokenizer in the folder; otherwise that of the base, with the folder's chat templates if there are any.

    Raises:
        InputError: If the folder has only a part of a tokenizer.
    """
    parts = [name for name in (_CONFIG, *_PARTS) if (folder / name).is_file()]
    if _CONFIG in parts and any(name in parts for name in _VOCABULARIES):
        return read_tokenizer(folder)
    if parts:
        raise InputError(
            f"{folder}: holds only a part of a tokenizer ({', '.join(parts)}); expected {_CONFIG} and a vocabulary "
            f"such as {_VOCABULARIES[0]}, or none of them if the adapter uses the tokenizer of its base"
        )
    paths = {"default": folder / _TEMPLATE} | {
        path.stem: path for path in sorted((folder / _TEMPLATES).glob("*.jinja"))
    }
    templates = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
    if not templates:
        return base
    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = templates["default"] if list(templates) == ["default"] else templates
    return tokenizer
