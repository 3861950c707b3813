"""Weights from safetensors straight onto their shardings: each device's part is read, and nothing else is held."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.hub.folder import read_json_object
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params


class TensorFiles:
    """The tensors of a folder: one model.safetensors, or several with model.safetensors.index.json."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self._slices = {}
        self._open = []  # keeps the memory maps alive as long as their slices
        for path in _safetensors_files(folder):
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: not a readable safetensors file ({error})") from error
            self._open.append(file)
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                self._slices[name] = file.get_slice(name)
        self.folder = folder

    def names(self) -> Iterator[str]:
        """Yields the names of all tensors."""
        return iter(self._slices)

    def get(self, name: str, shape: tuple[int, ...]):
        """Returns a slice object of the tensor, whose bytes are read when it is indexed.

        Raises:
            InputError: If the tensor is missing or has another shape.
        """
        if name not in self._slices:
            close = ", ".join(sorted(self._slices)[:4])
            raise InputError(f"{self.folder}: no tensor {name!r} in its safetensors files (they begin with: {close})")
        found = tuple(self._slices[name].get_shape())
        if found != shape:
            raise InputError(
                f"{self.folder}: tensor {name!r} has shape {found}; config.json says that it should be {shape}"
            )
        return self._slices[name]


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: no key 'weight_map' with a name of a file for each tensor")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{index}: names files that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise InputError(
            f"{folder}: {pickles[0]} is a pickle file, which can run code when it is loaded, so it is never opened; "
            "expected model.safetensors (transformers writes it: model.save_pretrained(folder))"
        )
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def read_params(folder: Path, model: CausalLM, shardings: Params) -> Params:
    """Reads a model's parameters, each device's part straight from the file onto the device.

    Args:
        folder: A Hugging Face folder.
        model: The model, whose `compute.param_dtype` the parameters take.
        shardings: Tree of `jax.sharding.Sharding`, like the parameters.

    Returns:
        The parameters.

    Raises:
        InputError: If a tensor is missing or misshapen, or the weights are a pickle.
    """
    files = TensorFiles(folder)
    sources = model.family.hf_tensors(model.config)

    def read(path, abstract, sharding):
        name, transposed = sources[jax.tree_util.keystr(path, simple=True, separator="/")]
        layers = abstract.shape[0] if "{layer}" in name else None
        shape = abstract.shape if layers is None else abstract.shape[1:]
        stored = tuple(reversed(shape)) if transposed else shape
        parts = [files.get(name.format(layer=i), stored) for i in range(layers or 1)]

        def part_of_device(index: tuple[slice, ...]) -> np.ndarray:
            chosen = parts if layers is None else parts[index[0]]
            inner = index if layers is None else index[1:]
            inner = tuple(slice(*piece.indices(size)) for piece, size in zip(inner, shape, strict=True))
            out = np.empty((len(chosen), *(piece.stop - piece.start for piece in inner)), abstract.dtype)
            for i, part in enumerate(chosen):
                out[i] = part[tuple(reversed(inner))].T if transposed else part[inner]
            return out[0] if layers is None else out

        return jax.make_array_from_callback(abstract.shape, sharding, part_of_device)

    return jax.tree_util.tree_map_with_path(read, model.abstract_params(), shardings)
