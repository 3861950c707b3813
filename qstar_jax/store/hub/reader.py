"""Reads weights from safetensors directly onto their shardings, holding only one device's shard at a time."""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from qstar_jax.config import ComputeOptions
from qstar_jax.console import track, visible
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.family import Family
from qstar_jax.store.hub.folder import read_config, read_json_object
from qstar_jax.store.hub.shards import INDEX

NUMBER_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names; others are quantized
SINGLE = "model.safetensors"
_CHUNK = 4096  # rows to compare at a time
_MOMENT = 1.0  # seconds that reading takes before there is a bar


class TensorFiles:
    """The tensors of a folder, in model.safetensors or in several files with model.safetensors.index.json.

    Raises:
        InputError: If there are none, a file cannot be read, a tensor is in two files, or not in the one that the index
            names.
    """

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self._slices = {}
        self._files = []  # keeps the memory maps alive as long as their slices
        weight_map = _read_weight_map(folder)
        for path in (
            [folder / SINGLE] if weight_map is None else [folder / name for name in sorted({*weight_map.values()})]
        ):
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: not a readable safetensors file ({error})") from error
            self._files.append(file)
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if name in self._slices:
                    raise InputError(f"{path}: tensor {name!r} is in another file of {folder} too; remove one of them")
                if weight_map is not None and weight_map.pop(name, path.name) != path.name:
                    raise InputError(f"{folder / INDEX}: names another file than {path.name}, where {name!r} is")
                self._slices[name] = file.get_slice(name)
        if weight_map:
            name, file = min(weight_map.items())
            raise InputError(f"{folder / INDEX}: says that {name!r} is in {file}, where it is not")
        self.folder = folder

    def names(self) -> Iterator[str]:
        """Yields the names of all tensors."""
        return iter(self._slices)

    def renamed(self, rename: Callable[[str], str | None]) -> "TensorFiles":
        """Renames the tensors, dropping those that `rename` maps to None.

        Raises:
            InputError: If two get the same name, or one has a dtype other than `NUMBER_TYPES`.
        """
        result = copy(self)
        result._slices, old_names = {}, {}
        for name, tensor in self._slices.items():
            new = rename(name)
            if new in old_names:
                raise InputError(
                    f"{self.folder}: tensors {old_names[new]!r} and {name!r} are the same parameter; remove one"
                )
            if new is not None:
                self._check_numbers(name)
                result._slices[new], old_names[new] = tensor, name
        return result

    def _check_numbers(self, name: str):
        kind = self._slices[name].get_dtype()
        if kind not in NUMBER_TYPES:
            raise InputError(
                f"{self.folder}: tensor {name!r} has numbers of type {kind}; expected {', '.join(NUMBER_TYPES)}; "
                "convert the weights, or dequantize them if they are quantized (transformers: model.dequantize())"
            )

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same numbers; False if one is missing."""
        if first not in self._slices or second not in self._slices:
            return False
        a, b = self._slices[first], self._slices[second]
        if a.get_shape() != b.get_shape():
            return False
        rows = a.get_shape()[0]
        chunks = [slice(start, min(start + _CHUNK, rows)) for start in range(0, rows, _CHUNK)]
        return all(np.array_equal(a[chunk], b[chunk]) for chunk in chunks)

    def get(self, name: str, shape: tuple[int, ...]):
        """Returns a slice object of the tensor, which reads its bytes when indexed.

        Raises:
            InputError: If the tensor is missing, has another shape, or a dtype other than `NUMBER_TYPES`.
        """
        if name not in self._slices:
            first = ", ".join(sorted(self._slices)[:4])
            raise InputError(f"{self.folder}: no tensor {name!r} in its safetensors files (they begin with: {first})")
        actual = tuple(self._slices[name].get_shape())
        if actual != shape:
            raise InputError(
                f"{self.folder}: tensor {name!r} has shape {actual}; expected {shape} according to config.json"
            )
        self._check_numbers(name)
        return self._slices[name]


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    """Reads which file holds each tensor; None if there is a single file."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise InputError(
            f"{folder}: holds {single.name} and {index.name}, perhaps from two models; remove the outdated one"
        )
    if single.is_file():
        return None
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
            raise InputError(
                f"{index}: no key 'weight_map' that maps tensors to files of this folder, such as "
                "model-00001-of-00002.safetensors"
            )
        names = sorted({*weight_map.values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{index}: names missing files: {', '.join(missing)}")
        return weight_map
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise InputError(
            f"{folder}: {pickles[0]} is a pickle file, which can run code when loaded, so it is never opened; expected "
            "model.safetensors (written by transformers: model.save_pretrained(folder))"
        )
    raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _is_file_name(value: Any) -> bool:
    """Whether a value names a file of the same folder."""
    return isinstance(value, str) and value == Path(value).name


def read_model(folder: Path, compute: ComputeOptions = ComputeOptions()) -> CausalLM:
    """Builds the model described by the config.json of a folder.

    If config.json ties the embeddings but the files hold a different output embedding (as written by trainers that
    shard parameters), the stored one is used and the embeddings are untied.

    Raises:
        InputError: If the model is unknown, or a file in the folder cannot be read.
    """
    model = CausalLM.from_hf(read_config(folder), compute)
    if not model.config.tie_word_embeddings:
        return model
    files, tables = model_files(folder, model), _tables(model)
    if not set(tables) <= set(files.names()) or files.equal(*tables):
        return model
    return replace(model, config=replace(model.config, tie_word_embeddings=False))


def model_files(folder: Path, model: CausalLM) -> TensorFiles:
    """Returns the tensors of a folder under their canonical names in the model's family.

    Raises:
        InputError: If a file cannot be read, or is a pickle.
    """
    return TensorFiles(folder).renamed(model.family.canonical)


def read_params(folder: Path, model: CausalLM, shardings: Params, besides: Collection[str] = ()) -> Params:
    """Reads the parameters of a model, each device's shard directly from the file onto the device.

    Args:
        folder: A Hugging Face folder.
        model: The model; parameters take its `compute.param_dtype`.
        shardings: Tree of `jax.sharding.Sharding`, like the parameters.
        besides: Names of tensors that the caller reads.

    Raises:
        InputError: If a tensor is missing, has the wrong shape, is not finite or does not belong to the model, or the
            weights are a pickle.
    """
    # Account for every tensor first: nothing is read if one would be ignored.
    warn_outside(folder, TensorFiles(folder).names(), model.family)
    files, tensors = model_files(folder, model), model.tensors
    _check_unread(files, set(files.names()) - _tensor_names(model) - set(besides), model)

    def read(path, abstract, sharding):
        # A stacked parameter is stored as one tensor per layer.
        tensor = tensors[jax.tree_util.keystr(path, simple=True, separator="/")]
        layers, shape = (abstract.shape[0], abstract.shape[1:]) if tensor.in_layers else (1, abstract.shape)
        stored = [files.get(tensor.name.format(layer=i), tensor.stored_shape(shape)) for i in range(layers)]

        # JAX calls this for each device with the slices of its shard; only their bytes are read.
        def read_shard(index: tuple[slice, ...]) -> np.ndarray:
            index = tuple(slice(*axis.indices(size)) for axis, size in zip(index, abstract.shape, strict=True))
            selected, inner = (stored[index[0]], index[1:]) if tensor.in_layers else (stored, index)
            shard = np.empty((len(selected), *(axis.stop - axis.start for axis in inner)), abstract.dtype)
            for i, layer in enumerate(selected):
                shard[i] = tensor.read(layer, inner)
            if not np.isfinite(shard).all():
                raise InputError(
                    f"{folder}: tensor {tensor.name.format(layer='*')!r} holds numbers that are not finite in "
                    f"{shard.dtype}, so every response would be nonsense; use an earlier checkpoint of this model"
                )
            return shard if tensor.in_layers else shard[0]

        return jax.make_array_from_callback(abstract.shape, sharding, read_shard)

    params, tree = jax.tree_util.tree_flatten_with_path(model.abstract_params())
    work = [
        (path, abstract, sharding)
        for (path, abstract), sharding in zip(params, tree.flatten_up_to(shardings), strict=True)
    ]
    console = Console(quiet=jax.process_index() != 0)
    return tree.unflatten(
        read(*part) for part in track(console, work, f"reading {folder.name}", len(work), after=_MOMENT)
    )


def warn_outside(path: Path, names: Iterable[str], family: Family):
    """Warns about tensors of a file or folder that are not part of the decoder."""
    outside = sorted(name for name in names if re.search(family.outside, name))
    if outside:
        warnings.warn(
            f"{visible(str(path))}: {len(outside)} tensors such as {outside[0]!r} are left out: only the text decoder "
            "is read, trained and exported",
            stacklevel=3,
        )


def _tensor_names(model: CausalLM) -> set[str]:
    """Returns the names of all tensors that the model reads."""
    layers = range(model.config.num_hidden_layers)
    return {tensor.name.format(layer=i) for tensor in model.tensors.values() for i in layers}


def _check_unread(files: TensorFiles, unread: set[str], model: CausalLM):
    """Refuses tensors that the model does not read: without them it would compute wrong numbers."""
    embedding, head = _tables(model)
    if head in unread and files.equal(embedding, head):  # a copy of the tied embedding
        unread.remove(head)
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise InputError(
            f"{files.folder}: its files hold {min(unread)!r}{more}, which the {model.model_type} model of config.json "
            "does not use; correct config.json if it omits a part of the model, or remove the tensors"
        )


def _tables(model: CausalLM) -> tuple[str, str]:
    """Returns the tensor names of the input and the output embedding, even if they are tied."""
    tensors = replace(model, config=replace(model.config, tie_word_embeddings=False)).tensors
    return tensors["embed/embedding"].name, tensors["unembed/embedding"].name
