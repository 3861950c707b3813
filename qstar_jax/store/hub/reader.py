"""Weights from safetensors straight onto their shardings: each device's part is read, and nothing else is held."""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.family import Family
from qstar_jax.store.hub.folder import read_config, read_json_object

NUMBER_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of safetensors; others are quantised
_ROWS = 4096  # compared at once


class TensorFiles:
    """The tensors of a folder: one model.safetensors, or several with model.safetensors.index.json.

    Raises:
        InputError: If there are none, a file cannot be read, or a tensor lies in two files.
    """

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
                if name in self._slices:
                    raise InputError(f"{path}: tensor {name!r} is in another file of {folder} too; remove one of them")
                self._slices[name] = file.get_slice(name)
        self.folder = folder

    def names(self) -> Iterator[str]:
        """Yields the names of all tensors."""
        return iter(self._slices)

    def renamed(self, rename: Callable[[str], str | None]) -> "TensorFiles":
        """The same tensors under other names, without those that have none.

        Raises:
            InputError: If two have one name then, or one has numbers of another type than `NUMBER_TYPES`.
        """
        other = copy(self)
        other._slices, before = {}, {}
        for name, found in self._slices.items():
            new = rename(name)
            if new in before:
                raise InputError(f"{self.folder}: tensors {before[new]!r} and {name!r} are one parameter; remove one")
            if new is not None:
                self._check_numbers(name)
                other._slices[new], before[new] = found, name
        return other

    def _check_numbers(self, name: str):
        kind = self._slices[name].get_dtype()
        if kind not in NUMBER_TYPES:
            raise InputError(
                f"{self.folder}: tensor {name!r} has numbers of type {kind}; expected {', '.join(NUMBER_TYPES)}; "
                "convert the weights, or dequantise them if they are quantised (transformers: model.dequantize())"
            )

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same numbers; False where one is not there."""
        if first not in self._slices or second not in self._slices:
            return False
        a, b = self._slices[first], self._slices[second]
        if a.get_shape() != b.get_shape():
            return False
        rows = a.get_shape()[0]
        slices = [slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS)]
        return all(np.array_equal(a[part], b[part]) for part in slices)

    def get(self, name: str, shape: tuple[int, ...]):
        """Returns a slice object of the tensor, whose bytes are read when it is indexed.

        Raises:
            InputError: If the tensor is missing, has another shape, or numbers of another type than `NUMBER_TYPES`.
        """
        if name not in self._slices:
            close = ", ".join(sorted(self._slices)[:4])
            raise InputError(f"{self.folder}: no tensor {name!r} in its safetensors files (they begin with: {close})")
        found = tuple(self._slices[name].get_shape())
        if found != shape:
            raise InputError(
                f"{self.folder}: tensor {name!r} has shape {found}; config.json says that it should be {shape}"
            )
        self._check_numbers(name)
        return self._slices[name]


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise InputError(
            f"{folder}: holds {single.name} and {index.name}, which may be of two models; remove the one that is old"
        )
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


def read_model(folder: Path, compute: ComputeOptions = ComputeOptions()) -> CausalLM:
    """Builds the model that a folder describes, by config.json and by what its files hold.

    Where config.json ties the unembedding to the embedding, and the files hold another one (as trainers write that cut
    parameters into pieces), that one is the model's: what was trained goes before what was meant.

    Args:
        folder: A Hugging Face folder.
        compute: Types and rematerialisation.

    Returns:
        The model, without its parameters.

    Raises:
        InputError: If it is not known, or something in the folder cannot be read.
    """
    model = CausalLM.from_hf(read_config(folder), compute)
    if not model.config.tie_word_embeddings:
        return model
    files, tables = model_files(folder, model), _tables(model)
    if not set(tables) <= set(files.names()) or files.equal(*tables):
        return model
    return replace(model, config=replace(model.config, tie_word_embeddings=False))


def model_files(folder: Path, model: CausalLM) -> TensorFiles:
    """The tensors of a folder by the names that the model's family has for them.

    Raises:
        InputError: If a file cannot be read, or is a pickle.
    """
    return TensorFiles(folder).renamed(model.family.canonical)


def read_params(folder: Path, model: CausalLM, shardings: Params, besides: Collection[str] = ()) -> Params:
    """Reads a model's parameters, each device's part straight from the file onto the device.

    Args:
        folder: A Hugging Face folder.
        model: The model, whose `compute.param_dtype` the parameters take.
        shardings: Tree of `jax.sharding.Sharding`, like the parameters.
        besides: Names of tensors that the caller reads.

    Returns:
        The parameters.

    Raises:
        InputError: If a tensor is missing, misshapen, not finite or not one of the model's, or the weights are a
            pickle.
    """
    tell_outside(folder, TensorFiles(folder).names(), model.family)
    files, tensors = model_files(folder, model), model.tensors
    _check_left(files, set(files.names()) - _tensor_names(model) - set(besides), model)

    def read(path, abstract, sharding):
        tensor = tensors[jax.tree_util.keystr(path, simple=True, separator="/")]
        layers, shape = (abstract.shape[0], abstract.shape[1:]) if tensor.in_layers else (1, abstract.shape)
        stored = [files.get(tensor.name.format(layer=i), tensor.stored_shape(shape)) for i in range(layers)]

        def part_of_device(index: tuple[slice, ...]) -> np.ndarray:
            index = tuple(slice(*piece.indices(size)) for piece, size in zip(index, abstract.shape, strict=True))
            chosen, inner = (stored[index[0]], index[1:]) if tensor.in_layers else (stored, index)
            out = np.empty((len(chosen), *(piece.stop - piece.start for piece in inner)), abstract.dtype)
            for i, one in enumerate(chosen):
                out[i] = tensor.read(one, inner)
            if not np.isfinite(out).all():
                raise InputError(
                    f"{folder}: tensor {tensor.name.format(layer='*')!r} holds numbers that are not finite in "
                    f"{out.dtype}, so every answer would be nonsense; take an earlier checkpoint of this model"
                )
            return out if tensor.in_layers else out[0]

        return jax.make_array_from_callback(abstract.shape, sharding, part_of_device)

    return jax.tree_util.tree_map_with_path(read, model.abstract_params(), shardings)


def tell_outside(path: Path, names: Iterable[str], family: Family):
    """Warns of tensors of a file or folder that are no part of the decoder."""
    outside = sorted(name for name in names if re.search(family.outside, name))
    if outside:
        warnings.warn(
            f"{path}: {len(outside)} tensors such as {outside[0]!r} are left out: only the text decoder is read, "
            "trained and exported",
            stacklevel=3,
        )


def _tensor_names(model: CausalLM) -> set[str]:
    """Names of all tensors that the model reads; one without layers stands for itself."""
    layers = range(model.config.num_hidden_layers)
    return {tensor.name.format(layer=i) for tensor in model.tensors.values() for i in layers}


def _check_left(files: TensorFiles, left: set[str], model: CausalLM):
    """Refuses tensors that the model has no place for: without them its numbers would be wrong."""
    embedding, head = _tables(model)
    if head in left and files.equal(embedding, head):  # a tied unembedding, written a second time
        left.remove(head)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(
            f"{files.folder}: its files hold {min(left)!r}{more}, and the {model.model_type} model of config.json has "
            "no place for it, so its numbers would be lost; correct config.json if it leaves a part of the model out, "
            "or remove the tensors"
        )


def _tables(model: CausalLM) -> tuple[str, str]:
    """Names of the embedding's tensor and of the unembedding's, whether the model has one of its own or not."""
    tensors = replace(model, config=replace(model.config, tie_word_embeddings=False)).tensors
    return tensors["embed/embedding"].name, tensors["unembed/embedding"].name
