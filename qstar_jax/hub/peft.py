"""Adapters in the file format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.hub.folder import read_json_object
from qstar_jax.models import CausalLM
from qstar_jax.models.lora import Lora, Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# Keys of adapter_config.json that change what the adapter computes -> the values that are built here.
_BUILT: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "lora_bias": (False, None),
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / CONFIG).is_file()


def read_base_name(folder: Path) -> str:
    """Reads the folder or hub name of the base to which an adapter belongs.

    Raises:
        InputError: If the adapter does not say.
    """
    name = read_json_object(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder / CONFIG}: base_model_name_or_path is {name!r}; expected a folder or a hub name")
    return name


def read_lora(folder: Path, model: CausalLM) -> Lora:
    """Reads the shape of an adapter.

    Args:
        folder: A folder in PEFT's format.
        model: The model to which it belongs.

    Returns:
        Its shape.

    Raises:
        InputError: If a key is missing, the adapter has a part that is not built here, or adapts layers that the model
            does not have.
    """
    path = folder / CONFIG
    config = read_json_object(path)
    for key, built in _BUILT.items():
        if config.get(key, built[0]) not in built:
            raise InputError(f"{path}: {key} is {config[key]!r}; adapters are built with {built[0]!r} only")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise InputError(f"{path}: no key {missing[0]!r} (found: {', '.join(sorted(config))})")
    targets = config["target_modules"]
    if isinstance(targets, str):  # PEFT also takes a regular expression over full names; these two forms are in use
        targets = list(model.linear_layers) if targets == "all-linear" else [targets]
    targets = [name.split(".")[-1] for name in targets]  # all layers of a name: a tensor that is missing is named later
    try:
        return model.with_lora(config["r"], config["lora_alpha"], targets, bool(config.get("use_rslora"))).lora
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_adapter(folder: Path, model: CausalLM, shardings: Params) -> Params:
    """Reads an adapter's matrices onto their shardings.

    Args:
        folder: A folder in PEFT's format.
        model: The model with its adapter's shape (`read_lora`).
        shardings: Tree of `jax.sharding.Sharding`, like the adapter.

    Returns:
        The adapter, float32.

    Raises:
        InputError: If a tensor is missing or misshapen, or the file is a pickle.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / TENSORS
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        why = f"; {pickle.name} is a pickle file, which is never opened" if pickle.exists() else ""
        raise InputError(f"{folder}: no {TENSORS}{why}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    adapter = jax.eval_shape(model.init_adapter, jax.random.key(0))
    read = set()

    def stack(keys, abstract, sharding):
        parts = []
        for name in _names(model, keys, abstract.shape[0]):
            found = tensors.get(name)
            if found is None or found.T.shape != abstract.shape[1:]:
                has = "no such tensor" if found is None else f"shape {found.shape}"
                raise InputError(
                    f"{path}: {name}: {has}; expected shape {tuple(reversed(abstract.shape[1:]))} "
                    f"(the file's tensors begin with: {', '.join(sorted(tensors)[:2])})"
                )
            read.add(name)
            parts.append(found.T.astype(np.float32))
        return jax.device_put(np.stack(parts), sharding)

    params = jax.tree_util.tree_map_with_path(stack, adapter, shardings)
    left = sorted(tensors.keys() - read)
    if left:
        raise InputError(f"{path}: holds {len(left)} tensors that {CONFIG} does not speak of, for instance {left[0]}")
    return params


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
    name, _ = model.family.hf_tensors(model.config)["/".join(module) + "/kernel"]
    kind = {"lora_a": "lora_A", "lora_b": "lora_B"}[matrix]
    for layer in range(layers):
        yield f"base_model.model.{name.format(layer=layer).removesuffix('.weight')}.{kind}.weight"
