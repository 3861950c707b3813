"""Reads and writes generation_config.json, which lists the EOS ids of a model; its other settings are kept."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qstar_jax.errors import InputError
from qstar_jax.store.files import write_json
from qstar_jax.store.hub.folder import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"
# Keys that are read (`eos_token_id`) or do not change decoding.
_HANDLED = """
    eos_token_id bos_token_id pad_token_id transformers_version use_cache cache_implementation
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
"""


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Reads the generation settings of a Hugging Face folder, which may lack a generation_config.json.

    Returns:
        Contents of generation_config.json, with `eos_token_id` a list that includes the ids of config.json.

    Raises:
        InputError: If a file is not JSON, or holds invalid ids.
    """
    paths = [path for name in (GENERATION, "config.json") if os.path.lexists(path := folder / name)]
    configs = {path.name: read_json_object(path) for path in paths}
    ids = [token for name, config in configs.items() for token in _eos_ids(config, folder / name)]
    return configs.get(GENERATION, {}) | {"eos_token_id": sorted(set(ids))}


def check_eos(generation: dict[str, Any], vocabulary: int, folder: Path):
    """Checks that a model can end its responses with the ids of `read_generation_config`.

    Raises:
        InputError: If one is not in its vocabulary.
    """
    if outside := [token for token in generation["eos_token_id"] if token >= vocabulary]:
        raise InputError(
            f"{folder}: eos_token_id {outside[0]} of {GENERATION} or config.json is not in the vocabulary of "
            f"{vocabulary:,} tokens (vocab_size of config.json); correct it"
        )


def with_eos(generation: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Adds the tokenizer's EOS, which ends responses in training, to the sorted list of EOS ids."""
    ids = {*_eos_ids(generation, Path(GENERATION)), tokenizer.eos_token_id} - {None}
    return generation | {"eos_token_id": sorted(ids)}


def other_settings(generation: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a generation_config.json other than EOS ids, which are ignored here."""
    handled = _HANDLED.split()
    return {
        key: value for key, value in generation.items() if key not in handled and key[0] != "_" and value is not None
    }


def write_generation_config(folder: Path, generation: dict[str, Any]):
    """Writes generation_config.json, unless it would be empty."""
    ids = generation.get("eos_token_id") or []
    generation = {key: value for key, value in generation.items() if key != "eos_token_id"} | eos_entry(ids)
    if generation:
        write_json(folder / GENERATION, generation)


def eos_entry(eos_ids: list[int]) -> dict[str, int | list[int]]:
    """Returns the entry `eos_token_id` in a form that older readers accept: a list only if there are several ids."""
    return {"eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids} if eos_ids else {}


def _eos_ids(config: dict[str, Any], path: Path) -> list[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise InputError(f"{path}: eos_token_id is {value!r}; expected a token id or a list of them")
    return ids
