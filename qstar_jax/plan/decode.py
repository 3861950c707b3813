"""The search that decoding would run, compiled from shapes alone."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax.config import MeshOptions
from qstar_jax.decoding import BeamOptions, SampleOptions, beam_search, sample
from qstar_jax.decoding.search.beam import block_size
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.sharding import use_mesh
from qstar_jax.store.checkpoints import abstract_with_shardings
from qstar_jax.store.open import param_shardings


def lower_search(
    model: CausalLM,
    prompts: tuple[int, int],
    options: BeamOptions | SampleOptions,
    mesh: Mesh,
    mesh_options: MeshOptions = MeshOptions(),
) -> jax.stages.Lowered:
    """Lowers a search for responses on a mesh whose devices need not be there.

    Args:
        model: The policy.
        prompts: Number of prompts, and tokens of each.
        options: Of a beam search, or of sampling; temperature 0 is greedy decoding.
        mesh: Devices that are there, or those of a topology.
        mesh_options: How parameters are sharded.
    """
    everywhere, (count, length) = NamedSharding(mesh, PartitionSpec()), prompts

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)

    with use_mesh(mesh, model.compute.dtype):
        params = abstract_with_shardings(model.abstract_params(), param_shardings(model, mesh, mesh_options))
        if mesh.devices.flat[0].platform != "tpu":
            params = _unstacked(model, params)
        common = model, params, integers(count, length), integers(count)
        if isinstance(options, BeamOptions):
            return beam_search.lower(*common, options)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
        keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=everywhere)
        return sample.lower(*common, keys if options.temperature else None, options)


def _unstacked(model: CausalLM, params: Params) -> Params:
    """Takes abstract layers apart, as `generate.params_for` does with real ones."""

    def layer(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)

    one = jax.tree.map(layer, params["layers"])
    return params | {"layers": dict.fromkeys(range(model.config.num_hidden_layers), one)}


def search_trips(options: BeamOptions | SampleOptions) -> int:
    """Returns how often the loop over tokens runs if no response ends early; a beam search runs blocks of them."""
    steps = options.max_new_tokens
    return -(-steps // block_size(steps)) if isinstance(options, BeamOptions) else steps
