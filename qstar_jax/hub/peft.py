"""Adapters in the file format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

How they are read: `peft_config` says which modules are adapted and how, `peft_edits` what that makes of each weight,
and `peft_merge` does it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from qstar_jax.hub.peft_config import CONFIG
from qstar_jax.hub.peft_file import PREFIX, TENSORS
from qstar_jax.models import CausalLM
from qstar_jax.models.lora import Params


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / CONFIG).is_file()


def write_adapter(folder: Path, model: CausalLM, adapter: Params, base: str):
    """Writes an adapter, which PEFT reads back.

    Args:
        folder: Made where it is missing.
        model: The model, with its adapter's shape.
        adapter: Its matrices, all on this host.
        base: Folder or hub name of the base, for whoever loads the adapter.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for keys, value in jax.tree_util.tree_leaves_with_path(jax.device_get(adapter)):
        for name, matrix in zip(_names(model, keys, len(value)), value, strict=True):
            tensors[name] = np.ascontiguousarray(matrix.T, np.float32)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "use_rslora": model.lora.rank_stabilised,
        "target_modules": list(model.lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _names(model: CausalLM, keys: tuple, layers: int) -> Iterator[str]:
    """PEFT's names of the tensors that are stacked in one array here."""
    *module, _, matrix = jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
    name = model.tensors["/".join(module) + "/kernel"].name
    kind = {"lora_a": "lora_A", "lora_b": "lora_B"}[matrix]
    for layer in range(layers):
        yield f"{PREFIX}{name.format(layer=layer).removesuffix('.weight')}.{kind}.weight"
