"""Parameters out to a Hugging Face folder, which transformers reads back."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qstar_jax.hub.generation import one_or_several, with_eos, write_generation_config
from qstar_jax.hub.tokenizer import write_tokenizer
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_folder(
    folder: Path,
    model: CausalLM,
    params: Params,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: str,
    generation: dict[str, Any] | None = None,
):
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files.

    Args:
        folder: Made where it is missing.
        model: The model.
        params: Its parameters, all on this host.
        tokenizer: Its tokenizer.
        dtype: Type of the stored tensors, "float32" or "bfloat16".
        generation: The dictionary of generation_config.json, whose `eos_token_id` config.json takes as well; by default
            the tokenizer's EOS alone.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    sources = model.family.hf_tensors(model.config)
    tensors: dict[str, np.ndarray] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        name, transposed = sources[jax.tree_util.keystr(path, simple=True, separator="/")]
        layers = value if "{layer}" in name else value[None]
        for i, part in enumerate(layers):
            tensors[name.format(layer=i)] = np.ascontiguousarray(part.T if transposed else part).astype(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    generation = with_eos({} if generation is None else generation, tokenizer)
    ids = {name: _known(getattr(tokenizer, name), model) for name in ("bos_token_id", "pad_token_id")}
    config = model.config.to_hf() | ids | one_or_several(generation["eos_token_id"]) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_generation_config(folder, ids | generation)
    write_tokenizer(folder, tokenizer)


def _known(token: int | None, model: CausalLM) -> int | None:
    """The token, unless the embedding has no row for it: torch opens no model whose padding lies beyond that."""
    return token if token is not None and token < model.config.vocab_size else None
