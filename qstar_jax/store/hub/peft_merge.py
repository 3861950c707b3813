"""Merges PEFT adapters into the parameters of their base."""

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
    """Merges an adapter into its base, in float32.

    Args:
        model: The merged model (see `peft_edits.read_edits`).
        edits: The edit of each module.
        params: Parameters of the base, which are donated.
        shardings: Tree of `jax.sharding.Sharding`, like the parameters of `model`.

    Returns:
        Parameters of `model`, in the dtype of the base.
    """
    # Group the edits by parameter and layer, splitting those of fused modules.
    modules, edits_of = modules_of(model), defaultdict(dict)
    for name, edit in edits.items():
        module = modules[name]
        for path, part in module.weight.items():
            edits_of[path][module.layer] = edit if part is None else edit.of_weight(part)
        for path, part in module.bias.items() if edit.bias is not None else ():
            edits_of[path][module.layer] = edit.of_bias(part)
    # Untie the embeddings if the adapter has trained them apart.
    if "unembed" in shardings and "unembed" not in params:
        table = params["embed"]["embedding"]
        copy = jax.device_put(table, shardings["unembed"]["embedding"], may_alias=False)
        params = params | {"unembed": {"embedding": copy}}

    def apply(keys, weight, sharding):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        by_layer = edits_of.get(path)
        if by_layer is None:
            return weight
        if None in by_layer:
            return _edit_one(weight, by_layer[None], path, sharding)
        return _edit_stack(weight, by_layer, sharding)

    return jax.tree_util.tree_map_with_path(apply, params, shardings)


def _edit_one(weight: jax.Array, edit: Edit, path: str, sharding: Sharding) -> jax.Array:
    """Edits a weight or bias outside of layers, which has the layout of the file."""
    if edit.value is not None:
        weight = jax.device_put(edit.value.astype(weight.dtype), sharding)
    if edit.left is not None:
        axis = -1 if path == UNEMBED else -2  # PEFT scales the columns of an input embedding
        weight = _add_product(weight, None, edit.left, edit.right, edit.norms, axis, sharding)
    return weight if edit.rows is None else _set(weight, *edit.rows, sharding)


def _edit_stack(weight: jax.Array, by_layer: dict[int, Edit], sharding: Sharding) -> jax.Array:
    """Edits some layers of a stack; kernels have the layout [layers, inputs, outputs]."""
    replaced = {layer: edit.value.T for layer, edit in by_layer.items() if edit.value is not None}
    if replaced:
        weight = _set(weight, np.array(list(replaced)), np.stack(list(replaced.values())), sharding)
    # Zero-pad factors to the largest rank, to add all products at once.
    added = {layer: edit for layer, edit in by_layer.items() if edit.left is not None}
    if added:
        rank = max(edit.left.shape[1] for edit in added.values())
        left = np.stack([_pad_rank(edit.right.T, rank) for edit in added.values()])
        right = np.stack([_pad_rank(edit.left, rank).T for edit in added.values()])
        norms = [edit.norms.T for edit in added.values() if edit.norms is not None]
        norms = np.stack(norms) if norms else None
        weight = _add_product(weight, np.array(list(added)), left, right, norms, -2, sharding)
    return weight


def _pad_rank(factor: np.ndarray, rank: int) -> np.ndarray:
    return np.pad(factor, ((0, 0), (0, rank - factor.shape[1])))


@partial(jax.jit, static_argnums=(5, 6), donate_argnums=0)
def _add_product(
    weight: Float[Array, "*L I O"],
    layers: np.ndarray | None,
    left: Float[Array, "*N I R"],
    right: Float[Array, "*N R O"],
    norms: Float[Array, "*N _ _"] | None,
    axis: int,
    sharding: Sharding,
) -> Float[Array, "*L I O"]:
    """Adds left @ right to some layers of a stack, or to a matrix; then rescales vectors along `axis` to `norms`."""
    updated = weight if layers is None else weight[layers]
    updated = updated.astype(jnp.float32) + jnp.matmul(left, right, precision="highest")
    if norms is not None:
        updated = updated * (norms / jnp.linalg.norm(updated, axis=axis, keepdims=True))
    updated = updated.astype(weight.dtype)
    return jax.lax.with_sharding_constraint(updated if layers is None else weight.at[layers].set(updated), sharding)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _set(weight: jax.Array, indices: np.ndarray, values: np.ndarray, sharding: Sharding) -> jax.Array:
    """Replaces some entries along the first axis."""
    return jax.lax.with_sharding_constraint(weight.at[indices].set(values.astype(weight.dtype)), sharding)
