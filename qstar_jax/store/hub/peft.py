"""Adapters in the file format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

How they are read: `peft_config` says which modules are adapted and how, `peft_edits` what that makes of each weight,
and `peft_merge` does it.
"""

import json
import re
from collections import defaultdict
from functools import reduce
from pathlib import Path

import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.lora import Params
from qstar_jax.models.tensors import Tensor
from qstar_jax.store.hub.folder import read_config_of
from qstar_jax.store.hub.peft_config import CONFIG
from qstar_jax.store.hub.peft_file import PREFIX, TENSORS
from qstar_jax.store.hub.peft_modules import rows_of

_DECODER = "model.language_model"  # what transformers calls the decoder of a multimodal model
_Pair = tuple[Tensor, Params]  # a kernel's place, and its matrices A [L, I, R] and B [L, R, O]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / CONFIG).is_file()


def write_adapter(folder: Path, model: CausalLM, adapter: Params, base: str):
    """Writes an adapter, which PEFT reads back.

    PEFT knows a fused module as one: its pair of matrices has the ranks of all its parts together, so that `A` holds
    those of the parts one below the other, and `B` has a block of each at its own outputs.

    Args:
        folder: Made where it is missing.
        model: The model, with its adapter's shape.
        adapter: Its matrices, all on this host.
        base: Folder or hub name of the base, for whoever loads the adapter.

    Raises:
        InputError: If the names of the base's modules depend on its config.json, and there is none.
    """
    from safetensors.numpy import save_file

    lora, names = model.lora, model.linear_modules
    pairs: dict[str, list[_Pair]] = defaultdict(list)  # by the name of the module
    for target in lora.targets:
        path = model.linear_layers[target]
        pairs[names[target]].append(
            (model.tensors[f"{path}/kernel"], reduce(dict.get, path.split("/"), adapter)["lora"])
        )
    ends = {name: _shortest_end(name, set(names.values())) for name in pairs}
    ranks = {ends[name]: lora.rank * len(parts) for name, parts in pairs.items() if len(parts) > 1}
    within = _is_within(model, base)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parts in pairs.items():
        stem = PREFIX + (re.sub("^model", _DECODER, name) if within else name)
        for layer in range(model.config.num_hidden_layers):
            a, b = _one_pair(parts, layer)
            tensors |= {f"{stem}.lora_A.weight".format(layer=layer): a, f"{stem}.lora_B.weight".format(layer=layer): b}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    targets = list(ends.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": ranks,
        "alpha_pattern": {end: lora.alpha_for(rank) for end, rank in ranks.items()},
        "use_rslora": lora.rank_stabilised,
        # A list would mean layers that look at images too.
        "target_modules": rf"{re.escape(_DECODER)}\..*\.({'|'.join(targets)})" if within else targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(not tensor.transposed for parts in pairs.values() for tensor, _ in parts),
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shortest_end(name: str, names: set[str]) -> str:
    """The shortest end of a module's name that means no other module."""
    parts = name.split(".")
    ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
    return next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in names) == 1)


def _one_pair(parts: list[_Pair], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrices [R, inputs] and [outputs, R] of one layer of a module, from those of its parts."""
    down = np.concatenate([np.asarray(lora["lora_a"][layer]).T for _, lora in parts])
    tensor, lora = parts[0]
    up = np.zeros((lora["lora_b"].shape[-1] if tensor.part is None else tensor.part.outputs, len(down)), np.float32)
    for (tensor, lora), block in zip(parts, np.split(np.arange(len(down)), len(parts)), strict=True):
        up[rows_of(tensor.part), block[0] : block[-1] + 1] = np.asarray(lora["lora_b"][layer]).T
    return np.ascontiguousarray(down, np.float32), up


def _is_within(model: CausalLM, base: str) -> bool:
    """Whether the base is a multimodal model, and the decoder a part of it."""
    if not model.family.unwrap:
        return False
    try:
        return read_config_of(base).get("model_type") in model.family.unwrap
    except InputError as error:
        raise InputError(
            f"the names in an adapter's file depend on config.json of its base, {base}: {error}"
        ) from error
