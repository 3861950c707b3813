"""Parameters out to a Hugging Face folder, which transformers reads back."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_folder(folder: Path, model: CausalLM, params: Params, tokenizer: "PreTrainedTokenizerBase", dtype: str):
    """Writes config.json, model.safetensors and the tokenizer's files.

    Args:
        folder: Made where it is missing.
        model: The model.
        params: Its parameters, all on this host.
        tokenizer: Its tokenizer.
        dtype: Type of the stored tensors, "float32" or "bfloat16".
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
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = model.config.to_hf() | ids | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
