"""The modules of a model in transformers (and hence in PEFT), and the parameters in each."""

from collections import defaultdict
from dataclasses import dataclass, replace

import jax
import numpy as np

from qstar_jax.models import CausalLM
from qstar_jax.models.tensors import Part

EMBED, POSITIONS, UNEMBED = "embed/embedding", "embed_positions/embedding", "unembed/embedding"


@dataclass(frozen=True)
class Module:
    """A module with a weight; a fused one holds several of our parameters.

    Attributes:
        layer: Its layer; None outside of layers.
        shape: Shape of its weight: [outputs, inputs] of a linear layer, [tokens, width] of an embedding, or [width] of
            a norm.
        weight: Path of each parameter in its weight -> its part of the outputs; None: all of them.
        bias: The same for its bias; empty if it has none.
        transposed: Whether the weight is stored as [inputs, outputs], as in GPT-2.
    """

    layer: int | None
    shape: tuple[int, ...]
    weight: dict[str, Part | None]
    bias: dict[str, Part | None]
    transposed: bool = False

    @property
    def is_layer(self) -> bool:
        """Whether it is a linear layer of a block."""
        return any(path.endswith("/kernel") for path in self.weight)

    @property
    def is_embedding(self) -> bool:
        """Whether it is an input embedding, of tokens or positions."""
        return not self.weight.keys().isdisjoint((EMBED, POSITIONS))

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm."""
        return len(self.shape) == 1


def modules_of(model: CausalLM) -> dict[str, Module]:
    """Lists the modules that have a weight, by their names in transformers; tied embeddings are two modules."""
    untied = replace(model.base, config=replace(model.config, tie_word_embeddings=False))
    leaves = jax.tree_util.tree_leaves_with_path(untied.abstract_params())
    shapes = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf.shape for keys, leaf in leaves}
    inside: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"weight": [], "bias": []})
    for path, tensor in untied.tensors.items():
        module, _, kind = tensor.name.rpartition(".")
        inside[module][kind].append(path)
    modules = {}
    for name, paths in inside.items():
        parts = {kind: {path: untied.tensors[path].part for path in paths[kind]} for kind in paths}
        path = paths["weight"][0]
        tensor, shape = untied.tensors[path], shapes[path]
        shape = tensor.stored_shape(shape[1:] if tensor.in_layers else shape)
        transposed = path.endswith("/kernel") and not tensor.transposed
        for layer in range(model.config.num_hidden_layers) if tensor.in_layers else (None,):
            module = Module(layer, shape[::-1] if transposed else shape, **parts, transposed=transposed)
            modules[name.format(layer=layer)] = module
    return modules


def output_indices(part: Part | None) -> np.ndarray | slice:
    """Returns the indices of a part's outputs among those of its module; a full slice for the whole module."""
    return slice(None) if part is None else part.indices()
