"""Writes adapters in the format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

To read one, `peft_config` parses which modules are adapted and how, `peft_edits` turns that into edits of each weight,
and `peft_merge` applies them.
"""

import re
from collections import defaultdict
from functools import reduce
from pathlib import Path

import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.lora import Params
from qstar_jax.models.tensors import Tensor
from qstar_jax.store.files import write_json
from qstar_jax.store.hub.folder import read_config_of
from qstar_jax.store.hub.peft_config import CONFIG
from qstar_jax.store.hub.peft_file import PREFIX, TENSORS
from qstar_jax.store.hub.peft_modules import output_indices

_DECODER = "model.language_model"  # name of the decoder of a multimodal model in transformers
_Pair = tuple[Tensor, Params]  # layout of a kernel, and its matrices A [L, I, R] and B [L, R, O]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def write_adapter(folder: Path, model: CausalLM, adapter: Params, base: str):
    """Writes an adapter that PEFT can read.

    PEFT adapts a fused module as a whole: the rank of its pair of matrices is the sum over its parts, with their `A`
    matrices stacked, and their `B` matrices as blocks at their own outputs.

    Args:
        folder: Created if it is missing.
        model: The model, with its adapter.
        adapter: The matrices of the adapter, all on this host.
        base: Folder or name on the Hub of the base, recorded for loading the adapter.

    Raises:
        InputError: If the names of the base's modules depend on its config.json, and there is none.
    """
    from safetensors.numpy import save_file

    # Group the adapted layers by module: several of them may be fused into one.
    lora, names = model.lora, model.linear_modules
    pairs: dict[str, list[_Pair]] = defaultdict(list)  # by the name of the module
    for target in lora.targets:
        path = model.linear_layers[target]
        pairs[names[target]].append(
            (model.tensors[f"{path}/kernel"], reduce(dict.get, path.split("/"), adapter)["lora"])
        )
    suffixes = {name: _shortest_suffix(name, set(names.values())) for name in pairs}
    ranks = {suffixes[name]: lora.rank * len(parts) for name, parts in pairs.items() if len(parts) > 1}
    multimodal = _is_multimodal(model, base)
    # Write one pair of matrices per module and layer.
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parts in pairs.items():
        stem = PREFIX + (re.sub("^model", _DECODER, name) if multimodal else name)
        for layer in range(model.config.num_hidden_layers):
            a, b = _fused_pair(parts, layer)
            tensors |= {f"{stem}.lora_A.weight".format(layer=layer): a, f"{stem}.lora_B.weight".format(layer=layer): b}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    # Write the configuration; alphas of fused modules keep the scale of their larger ranks.
    targets = list(suffixes.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": ranks,
        "alpha_pattern": {suffix: lora.alpha_for(rank) for suffix, rank in ranks.items()},
        "use_rslora": lora.rank_stabilised,
        # A list of names would also match layers of the vision tower.
        "target_modules": rf"{re.escape(_DECODER)}\..*\.({'|'.join(targets)})" if multimodal else targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(not tensor.transposed for parts in pairs.values() for tensor, _ in parts),
        "inference_mode": True,
    }
    write_json(folder / CONFIG, config)


def _shortest_suffix(name: str, names: set[str]) -> str:
    """Returns the shortest suffix of a module's name that matches no other module."""
    parts = name.split(".")
    suffixes = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
    return next(suffix for suffix in suffixes if sum(f".{other}".endswith(f".{suffix}") for other in names) == 1)


def _fused_pair(parts: list[_Pair], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Combines the matrices of the parts of a module in one layer, of shapes [R, inputs] and [outputs, R]."""
    down = np.concatenate([np.asarray(lora["lora_a"][layer]).T for _, lora in parts])
    tensor, lora = parts[0]
    up = np.zeros((lora["lora_b"].shape[-1] if tensor.part is None else tensor.part.outputs, len(down)), np.float32)
    for (tensor, lora), block in zip(parts, np.split(np.arange(len(down)), len(parts)), strict=True):
        up[output_indices(tensor.part), block[0] : block[-1] + 1] = np.asarray(lora["lora_b"][layer]).T
    return np.ascontiguousarray(down, np.float32), up


def _is_multimodal(model: CausalLM, base: str) -> bool:
    """Whether the base is a multimodal model that contains the decoder."""
    if not model.family.unwrap:
        return False
    try:
        return read_config_of(base).get("model_type") in model.family.unwrap
    except InputError as error:
        raise InputError(
            f"the tensor names of an adapter depend on the config.json of its base, {base}: {error}"
        ) from error
