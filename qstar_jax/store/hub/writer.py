"""Parameters out to a Hugging Face folder, which transformers reads back."""

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qstar_jax.config import ExportConfig
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.tensors import Tensor, join
from qstar_jax.store.hub.generation import one_or_several, with_eos, write_generation_config
from qstar_jax.store.hub.shards import StoredTensor, shard_bytes, write_shards
from qstar_jax.store.hub.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_folder(
    folder: Path,
    model: CausalLM,
    params: Params,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: str,
    generation: dict[str, Any] | None = None,
    max_shard_size: str = ExportConfig.max_shard_size,
):
    """Writes weights, generation_config.json, the tokenizer's files and, when all of them are there, config.json.

    A folder in which it was interrupted has no config.json, so nobody takes it for a model.

    Args:
        folder: Made where it is missing; without weights of another model.
        model: The model.
        params: Its parameters; where they are spread over processes, all of these call this, and the first writes.
        tokenizer: Its tokenizer.
        dtype: Type of the stored tensors, "float32" or "bfloat16".
        generation: The dictionary of generation_config.json, whose `eos_token_id` config.json takes as well; by default
            the tokenizer's EOS alone.
        max_shard_size: Largest size of a file of weights, such as "5GB" (see `shards.write_shards`).

    Raises:
        InputError: If the size is not spelled so.
    """
    max_bytes = shard_bytes(max_shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, _stored(model, params), dtype, max_bytes)
    if jax.process_index() != 0:
        return
    generation = with_eos({} if generation is None else generation, tokenizer)
    ids = {name: _known(getattr(tokenizer, name), model) for name in ("bos_token_id", "pad_token_id")}
    write_generation_config(folder, ids | generation)
    write_tokenizer(folder, tokenizer)
    types = dict.fromkeys(("dtype", "torch_dtype"), dtype)  # as transformers 5 calls it, and as 4 does
    config = model.to_hf() | ids | one_or_several(generation["eos_token_id"]) | types
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stored(model: CausalLM, params: Params) -> Iterator[StoredTensor]:
    """Yields the tensors outside of blocks, then those of layer after layer: a file holds whole layers where it can."""
    parts = defaultdict(list)  # name of a tensor -> the parameters that lie in it, each with its place
    for keys, value in jax.tree_util.tree_leaves_with_path(params):
        tensor = model.tensors[jax.tree_util.keystr(keys, simple=True, separator="/")]
        parts[tensor.name].append((tensor, value))
    for layer in (None, *range(model.config.num_hidden_layers)):
        for name, own in parts.items():
            tensor, value = own[0]
            if tensor.in_layers == (layer is not None):
                shape = tensor.stored_shape(value.shape[tensor.in_layers :])
                yield StoredTensor(name.format(layer=layer), shape, partial(_make, own, layer))


def _make(parts: list[tuple[Tensor, jax.Array]], layer: int | None) -> np.ndarray:
    of_layer = [(tensor, value if layer is None else _layer_of(value, layer)) for tensor, value in parts]
    return join([(tensor, _on_host(value)) for tensor, value in of_layer])


_layer_of = jax.jit(partial(jax.lax.dynamic_index_in_dim, keepdims=False))  # one program for all layers


def _on_host(array: jax.Array) -> np.ndarray:
    """Copies an array here, together with the other processes where parts of it lie with them."""
    return np.asarray(array) if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)


def _known(token: int | None, model: CausalLM) -> int | None:
    """The token, unless the embedding has no row for it: torch opens no model whose padding lies beyond that."""
    return token if token is not None and token < model.config.vocab_size else None
