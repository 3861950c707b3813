"""The tokens that end a response."""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qstar_jax.models import CausalLM
from qstar_jax.store import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class Decodable(Protocol):
    """A model with its tokenizer and generation settings: `store.open.LoadedModel` and `training.setup.Start`."""

    model: CausalLM
    tokenizer: "PreTrainedTokenizerBase"
    generation: dict[str, Any]


def eos_token_ids(loaded: Decodable, vocabulary: int | None = None) -> tuple[int, ...]:
    """Lists the ids of all tokens that end a response, in ascending order.

    A chat model often names several: its tokenizer the end of a text, its generation_config.json the end of a turn. All
    of generation_config.json, config.json and the tokenizer count, in folders, runs and exports alike. Only ids below
    `vocabulary` are listed, by default the model's.
    """
    limit = loaded.model.config.vocab_size if vocabulary is None else vocabulary
    named = hub.with_eos(loaded.generation, loaded.tokenizer)["eos_token_id"]
    return tuple(token for token in named if 0 <= token < limit)
