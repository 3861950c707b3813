"""Which tokens end an answer."""

from pathlib import Path
from typing import Any

from qstar_jax import hub
from qstar_jax.checkpoints import find_checkpoint, read_description
from qstar_jax.hub.folder import read_json_object
from qstar_jax.loading import LoadedModel


def eos_token_ids(loaded: LoadedModel, vocabulary: int | None = None) -> tuple[int, ...]:
    """Collects the ids of all tokens that end an answer, in ascending order.

    A chat model often names several: its tokenizer the end of a text, its generation_config.json the end of a turn. All
    of generation_config.json, config.json and the tokenizer count; a checkpoint has the last two.

    Args:
        loaded: Model and tokenizer.
        vocabulary: Only ids below this; by default the model's vocabulary.
    """
    named = [loaded.tokenizer.eos_token_id]
    for config in _configs(loaded.source):
        ids = config.get("eos_token_id")
        named += ids if isinstance(ids, list) else [ids]
    limit = loaded.model.config.vocab_size if vocabulary is None else vocabulary
    return tuple(sorted({token for token in named if token is not None and 0 <= token < limit}))


def _configs(source: str | Path) -> list[dict[str, Any]]:
    checkpoint = find_checkpoint(Path(source).expanduser())
    if checkpoint is not None:
        return [read_description(checkpoint).model]
    folder = hub.open_folder(str(source))
    if hub.is_adapter(folder):
        return _configs(hub.read_base_name(folder))
    paths = [folder / name for name in ("generation_config.json", "config.json")]
    return [read_json_object(path) for path in paths if path.is_file()]
