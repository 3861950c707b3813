"""The modules of a model, as transformers and so PEFT know them, and the parameters that lie in each."""

from collections import defaultdict
from dataclasses import dataclass, replace

import jax
import numpy as np

from qstar_jax.models import CausalLM
from qstar_jax.models.tensors import Part

EMBED, POSITIONS, UNEMBED = "embed/embedding", "embed_positions/embedding", "unembed/embedding"


@dataclass(frozen=True)
class Module:
    """A module that has a weight; several of our parameters lie in one that is fused.

    Attributes:
        layer: Its layer; None outside of blocks.
        shape: Of its weight: [outputs, inputs] of a linear layer, [tokens, width] of an embedding, [width] of a norm.
        weight: Path of each parameter in its weight -> its part of the outputs; None: all of them.
        bias: The same of its bias; empty where it has none.
        turned: Whether the weight is stored as [inputs, outputs], as by GPT-2.
    """

    layer: int | None
    shape: tuple[int, ...]
    weight: dict[str, Part | None]
    bias: dict[str, Part | None]
    turned: bool = False

    @property
    def is_layer(self) -> bool:
        """Whether it is a linear layer of a block."""
        return any(path.endswith("/kernel") for path in self.weight)

    @property
    def is_embedding(self) -> bool:
        """Whether its rows are looked up by a number."""
        return not self.weight.keys().isdisjoint((EMBED, POSITIONS))

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm."""
        return len(self.shape) == 1


def modules_of(model: CausalLM) -> dict[str, Module]:
    """Lists the modules of a model that have a weight, by transformers' names.

    Args:
        model: A model; one whose tables are tied has a module for each of them all the same.
    """
    untied = replace(model.base, config=replace(model.config, tie_word_embeddings=False))
    leaves = jax.tree_util.tree_leaves_with_path(untied.abstract_params())
    shapes = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf.shape for keys, leaf in leaves}
    inside: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"weight": [], "bias": []})
    for path, tensor in untied.tensors.items():
        module, _, kind = tensor.name.rpartition(".")
        inside[module][kind].append(path)
    found = {}
    for name, paths in inside.items():
        places = {kind: {path: untied.tensors[path].part for path in paths[kind]} for kind in paths}
        path = paths["weight"][0]
        tensor, shape = untied.tensors[path], shapes[path]
        shape = tensor.stored_shape(shape[1:] if tensor.in_layers else shape)
        turned = path.endswith("/kernel") and not tensor.transposed
        for layer in range(model.config.num_hidden_layers) if tensor.in_layers else (None,):
            module = Module(layer, shape[::-1] if turned else shape, **places, turned=turned)
            found[name.format(layer=layer)] = module
    return found


def rows_of(part: Part | None) -> np.ndarray | slice:
    """Indices of a part's outputs among those of its module; a slice of all for the whole."""
    return slice(None) if part is None else part.indices()
