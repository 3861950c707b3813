"""Writes weights as model.safetensors, or as several files with an index, without a second copy of the model."""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qstar_jax.errors import InputError

INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # as in huggingface_hub


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is computed when its file is written.

    Attributes:
        name: Its name in the file.
        shape: Its shape in the file.
        make: Returns the tensor, in any dtype and memory order. All processes call it, in the same order.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def shard_bytes(size: str) -> int:
    """Parses a file size in the format of huggingface_hub, such as "5GB" or "500MB", into bytes.

    Raises:
        InputError: If it has another format, or is zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", size.strip(), re.IGNORECASE)
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if count < 1:
        raise InputError(
            f"--max_shard_size is {size!r}; expected a positive number with one of the units {', '.join(_UNITS)}, "
            "such as 5GB or 500MB"
        )
    return count


def write_shards(folder: Path, tensors: Iterable[StoredTensor], dtype: str, max_bytes: int):
    """Writes weights file by file, so that only one file's tensors are in memory at a time.

    The first process writes; the others take part in computing the tensors, which may be sharded over their devices.

    Args:
        folder: An existing folder.
        tensors: The tensors, stored in this order.
        dtype: Dtype of the stored numbers.
        max_bytes: Maximum size of a file in bytes; a larger tensor gets its own file.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    by_name = {tensor.name: tensor for tensor in tensors}
    numbers = jnp.dtype(dtype)
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: math.prod(tensor.shape) * numbers.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    writes = jax.process_index() == 0
    weight_map, parameters = {}, 0
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            tensor = by_name[name].make()
            if writes:
                shard[name] = np.ascontiguousarray(tensor, numbers)
                weight_map[name], parameters = file, parameters + tensor.size
        if writes:
            save_file(shard, folder / file, metadata={"format": "pt"})
    if writes and split.is_sharded:
        metadata = {"total_parameters": parameters, "total_size": parameters * numbers.itemsize}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(index + "\n", encoding="utf-8")
