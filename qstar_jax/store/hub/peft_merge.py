"""Adapters of PEFT folded into the parameters of their base."""

from collections import defaultdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float

from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.store.hub.peft_edits import Edit
from qstar_jax.store.hub.peft_modules import UNEMBED, modules_of


def apply_edits(model: CausalLM, edits: dict[str, Edit], params: Params, shardings: Params) -> Params:
    """Folds an adapter into its base, in float32.

    Args:
        model: What the base becomes (see `peft_edits.read_edits`).
        edits: What becomes of its weights.
        params: Parameters of the base; they are used up.
        shardings: Tree of `jax.sharding.Sharding`, like the parameters of `model`.

    Returns:
        Parameters of `model`, in the type of the base.
    """
    modules, of_path = modules_of(model), defaultdict(dict)
    for name, edit in edits.items():
        module = modules[name]
        for path, part in module.weight.items():
            of_path[path][module.layer] = edit if part is None else edit.of_weight(part)
        for path, part in module.bias.items() if edit.bias is not None else ():
            of_path[path][module.layer] = edit.of_bias(part)
    if "unembed" in shardings and "unembed" not in params:  # the tables part
        table = params["embed"]["embedding"]
        copy = jax.device_put(table, shardings["unembed"]["embedding"], may_alias=False)
        params = params | {"unembed": {"embedding": copy}}

    def edited(keys, weight, sharding):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        by_layer = of_path.get(path)
        if by_layer is None:
            return weight
        if None in by_layer:
            return _edit_one(weight, by_layer[None], path, sharding)
        return _edit_stack(weight, by_layer, sharding)

    return jax.tree_util.tree_map_with_path(edited, params, shardings)


def _edit_one(weight: jax.Array, edit: Edit, path: str, sharding: Sharding) -> jax.Array:
    """Edits a weight or bias outside of blocks, which lies as in a file."""
    if edit.value is not None:
        weight = jax.device_put(edit.value.astype(weight.dtype), sharding)
    if edit.left is not None:
        axis = -1 if path == UNEMBED else -2  # of an embedding, PEFT scales the columns
        weight = _plus_product(weight, None, edit.left, edit.right, edit.lengths, axis, sharding)
    return weight if edit.rows is None else _with_parts(weight, *edit.rows, sharding)


def _edit_stack(weight: jax.Array, by_layer: dict[int, Edit], sharding: Sharding) -> jax.Array:
    """Edits some layers of a stack; kernels lie as [layers, inputs, outputs]."""
    replaced = {layer: edit.value.T for layer, edit in by_layer.items() if edit.value is not None}
    if replaced:
        weight = _with_parts(weight, np.array(list(replaced)), np.stack(list(replaced.values())), sharding)
    added = {layer: edit for layer, edit in by_layer.items() if edit.left is not None}
    if added:
        rank = max(edit.left.shape[1] for edit in added.values())
        left = np.stack([_widened(edit.right.T, rank) for edit in added.values()])
        right = np.stack([_widened(edit.left, rank).T for edit in added.values()])
        lengths = [edit.lengths.T for edit in added.values() if edit.lengths is not None]
        lengths = np.stack(lengths) if lengths else None
        weight = _plus_product(weight, np.array(list(added)), left, right, lengths, -2, sharding)
    return weight


def _widened(factor: np.ndarray, rank: int) -> np.ndarray:
    """A factor with columns of zeros, so that factors of several ranks go into one stack."""
    return np.pad(factor, ((0, 0), (0, rank - factor.shape[1])))


@partial(jax.jit, static_argnums=(5, 6), donate_argnums=0)
def _plus_product(
    weight: Float[Array, "*L I O"],
    layers: np.ndarray | None,
    left: Float[Array, "*N I R"],
    right: Float[Array, "*N R O"],
    lengths: Float[Array, "*N _ _"] | None,
    axis: int,
    sharding: Sharding,
) -> Float[Array, "*L I O"]:
    """Adds left @ right to some layers of a stack, or to a matrix; then gives vectors along `axis` their lengths."""
    part = weight if layers is None else weight[layers]
    part = part.astype(jnp.float32) + jnp.matmul(left, right, precision="highest")
    if lengths is not None:
        part = part * (lengths / jnp.linalg.norm(part, axis=axis, keepdims=True))
    part = part.astype(weight.dtype)
    return jax.lax.with_sharding_constraint(part if layers is None else weight.at[layers].set(part), sharding)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _with_parts(weight: jax.Array, indices: np.ndarray, parts: np.ndarray, sharding: Sharding) -> jax.Array:
    """Puts other parts at some indices of the first axis."""
    return jax.lax.with_sharding_constraint(weight.at[indices].set(parts.astype(weight.dtype)), sharding)
