"""Writes models as Hugging Face folders that transformers can read."""

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
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.tensors import Tensor, join
from qstar_jax.store.hub.generation import eos_entry, with_eos, write_generation_config
from qstar_jax.store.hub.peft import is_adapter
from qstar_jax.store.hub.shards import StoredTensor, shard_bytes, write_shards
from qstar_jax.store.hub.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_free(folder: Path):
    """Checks that a model may be written into a folder.

    Raises:
        InputError: It holds one already, or what an interrupted export left.
    """
    if (folder / "config.json").exists() or is_adapter(folder):
        raise InputError(f"{folder} already holds a model; choose another folder")
    if left := sorted(path.name for path in folder.glob("*.safetensors*")):
        raise InputError(
            f"{folder} holds {left[0]} and no config.json, as an export that was interrupted leaves it; remove the "
            "folder, or choose another"
        )


def write_folder(
    folder: Path,
    model: CausalLM,
    params: Params,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: str,
    generation: dict[str, Any] | None = None,
    max_shard_size: str = ExportConfig.max_shard_size,
):
    """Writes weights, generation_config.json, the tokenizer's files and, last, config.json.

    An incomplete folder has no config.json, so it cannot be mistaken for a model.

    Args:
        folder: Created if it is missing; must not hold the weights of another model.
        model: The model.
        params: Its parameters; if they are sharded over processes, all must call this, and the first writes.
        tokenizer: Its tokenizer.
        dtype: Dtype of the stored tensors, "float32" or "bfloat16".
        generation: Contents of generation_config.json, whose `eos_token_id` is copied to config.json; by default the
            tokenizer's EOS alone.
        max_shard_size: Maximum size of a file of weights, such as "5GB" (see `shards.write_shards`).

    Raises:
        InputError: If the size has another format.
    """
    max_bytes = shard_bytes(max_shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, _stored(model, params), dtype, max_bytes)
    if jax.process_index() != 0:
        return
    generation = with_eos({} if generation is None else generation, tokenizer)
    ids = {name: _embedded_id(getattr(tokenizer, name), model) for name in ("bos_token_id", "pad_token_id")}
    write_generation_config(folder, ids | generation)
    write_tokenizer(folder, tokenizer)
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), dtype)  # the names in transformers 5 and 4
    config = model.to_hf() | ids | eos_entry(generation["eos_token_id"]) | dtypes
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stored(model: CausalLM, params: Params) -> Iterator[StoredTensor]:
    """Yields the tensors outside of layers, then those of each layer, so that files hold whole layers if possible."""
    parts = defaultdict(list)  # name of a tensor -> (layout, parameter) of each parameter in it
    for keys, value in jax.tree_util.tree_leaves_with_path(params):
        tensor = model.tensors[jax.tree_util.keystr(keys, simple=True, separator="/")]
        parts[tensor.name].append((tensor, value))
    for layer in (None, *range(model.config.num_hidden_layers)):
        for name, fused in parts.items():
            tensor, value = fused[0]
            if tensor.in_layers == (layer is not None):
                shape = tensor.stored_shape(value.shape[tensor.in_layers :])
                yield StoredTensor(name.format(layer=layer), shape, partial(_make, fused, layer))


def _make(parts: list[tuple[Tensor, jax.Array]], layer: int | None) -> np.ndarray:
    layer_parts = [(tensor, value if layer is None else _index_layer(value, layer)) for tensor, value in parts]
    return join([(tensor, _to_host(value)) for tensor, value in layer_parts])


_index_layer = jax.jit(partial(jax.lax.dynamic_index_in_dim, keepdims=False))  # one program for all layers


def _to_host(array: jax.Array) -> np.ndarray:
    """Copies an array to this host; gathers it first if it is sharded over processes."""
    return np.asarray(array) if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)


def _embedded_id(token: int | None, model: CausalLM) -> int | None:
    """Returns a token id, or None beyond the embedding: torch cannot open a model with such a padding token."""
    return token if token is not None and token < model.config.vocab_size else None
