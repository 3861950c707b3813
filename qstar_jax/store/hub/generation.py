"""generation_config.json: it goes along whole, and says which tokens end an answer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qstar_jax.errors import InputError
from qstar_jax.store.hub.folder import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"
# Of its keys, those that change nothing in how answers are searched for, or are read (`eos_token_id`).
_NOTED = """
    eos_token_id bos_token_id pad_token_id transformers_version use_cache cache_implementation
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
"""


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Reads how a folder's model wants to be decoded.

    Args:
        folder: A Hugging Face folder; it need not have a generation_config.json.

    Returns:
        The dictionary of generation_config.json, its `eos_token_id` a list that has those of config.json too.

    Raises:
        InputError: If a file is not JSON, or ids in it are none.
    """
    paths = [path for name in (GENERATION, "config.json") if (path := folder / name).is_file()]
    configs = {path.name: read_json_object(path) for path in paths}
    ids = [token for name, config in configs.items() for token in _eos_ids(config, folder / name)]
    return configs.get(GENERATION, {}) | {"eos_token_id": sorted(set(ids))}


def with_eos(generation: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Adds the tokenizer's EOS to the tokens that end an answer, as it is what ends them in training.

    Args:
        generation: The dictionary of a generation_config.json; may be empty.
        tokenizer: The tokenizer.

    Returns:
        The same with `eos_token_id` as a list in ascending order; maybe empty.
    """
    ids = {*_eos_ids(generation, Path(GENERATION)), tokenizer.eos_token_id} - {None}
    return generation | {"eos_token_id": sorted(ids)}


def other_settings(generation: dict[str, Any]) -> dict[str, Any]:
    """What a generation_config.json asks of decoding beside the ends of answers: none of it is read here."""
    noted = _NOTED.split()
    return {key: value for key, value in generation.items() if key not in noted and key[0] != "_" and value is not None}


def write_generation_config(folder: Path, generation: dict[str, Any]):
    """Writes generation_config.json, where it says anything."""
    ids = generation.get("eos_token_id") or []
    generation = {key: value for key, value in generation.items() if key != "eos_token_id"} | one_or_several(ids)
    if generation:
        (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def one_or_several(eos_ids: list[int]) -> dict[str, int | list[int]]:
    """The entry `eos_token_id` as older readers know it: a number where there is one, else a list; none for none."""
    return {"eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids} if eos_ids else {}


def _eos_ids(config: dict[str, Any], path: Path) -> list[int]:
    found = config.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(token) is int for token in ids):
        raise InputError(f"{path}: eos_token_id is {found!r}; expected a token id or a list of them")
    return ids
