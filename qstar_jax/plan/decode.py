"""The search that decoding would run, compiled from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax.config import MeshOptions
from qstar_jax.decoding import BeamOptions, ChunkOptions, SampleOptions
from qstar_jax.decoding.decoder import WIDTH, Decoder
from qstar_jax.decoding.options import DecodePlan
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.search.beam import block_size
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.sharding import use_mesh
from qstar_jax.store.checkpoints import abstract_with_shardings
from qstar_jax.store.open import param_shardings


@dataclass(frozen=True)
class LoweredSearch:
    """A search, ready to be compiled.

    Attributes:
        lowered: The program.
        prompts: Number of prompts that it reads at once.
        flops: Model FLOPs of the search, over all devices.
        tokens: New tokens of the responses that it returns.
        unknown_trips: Trips of its loops over tokens (see `Module`).
    """

    lowered: jax.stages.Lowered
    prompts: int
    flops: float
    tokens: int
    unknown_trips: tuple[float, ...]


def lower_search(
    models: Sequence[CausalLM],
    plan: DecodePlan,
    prompts: int,
    prompt_length: int,
    mesh: Mesh,
    mesh_options: MeshOptions = MeshOptions(),
    weights: Sequence[float] = (),
) -> LoweredSearch:
    """Lowers a search for responses on a mesh whose devices need not be there; no response ends early.

    Args:
        models: The policy, and the models that run beside it: its reference, or pairs that guide it.
        plan: The `decode:` block, interpreted.
        prompts: Prompts per batch; methods that decode one at a time take one.
        prompt_length: Tokens of each.
        mesh: Devices that are there, or those of a topology.
        mesh_options: How parameters are sharded.
        weights: Weight of each pair of models.

    Raises:
        InputError: If the method's programs cannot be known beforehand.
    """
    stages = search_stages(plan)
    decoder = Decoder(
        model=Ensemble(tuple(models)) if len(models) > 1 else models[0],
        params=None,
        tokenizer=None,
        plan=plan.with_tokens(()),
        objective=plan.objective(plan.block.beta or 1.0, weights),
        beta=plan.block.beta,
        stop_strings=None,
        vocabulary=min(model.config.vocab_size for model in models),
        mesh=mesh,
    )
    count = prompts if plan.batched else 1
    everywhere, width = NamedSharding(mesh, PartitionSpec()), padded_length(prompt_length)

    def replicated(*shape: int, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def search(params, prompts, lengths, keys):
        return replace(decoder, params=params).search(prompts, lengths, keys)

    with use_mesh(mesh, models[0].compute.dtype):
        params = tuple(_abstract_params(model, mesh, mesh_options) for model in models)
        params = params if len(models) > 1 else params[0]
        keys = replicated(count, dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
        lowered = jax.jit(search).lower(params, replicated(count, width), replicated(count), keys)
    flops = sum(search_flops(model, count, prompt_length, stages) for model in models)
    return LoweredSearch(lowered, count, flops, new_tokens_of(plan, count), search_trips(plan))


def padded_length(prompt_length: int) -> int:
    """Returns the slots of a prompt."""
    return -(-prompt_length // WIDTH) * WIDTH


def new_tokens_of(plan: DecodePlan, prompts: int) -> int:
    """Returns the new tokens of the responses to some prompts."""
    return prompts * (plan.block.return_sequences or 1) * plan.block.max_new_tokens


def _abstract_params(model: CausalLM, mesh: Mesh, options: MeshOptions) -> Params:
    """Shapes and shardings of parameters in the layout that decodes best, as `generate.params_for` chooses it."""
    params = abstract_with_shardings(model.abstract_params(), param_shardings(model, mesh, options))
    if mesh.devices.flat[0].platform == "tpu":
        return params

    def layer(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)

    one = jax.tree.map(layer, params["layers"])
    return params | {"layers": dict.fromkeys(range(model.config.num_hidden_layers), one)}


def search_stages(plan: DecodePlan) -> list[tuple[int, int]]:
    """Lists (sequences per prompt, tokens that each has at the end) of the stages of a search.

    Raises:
        InputError: If they depend on what the model answers.
    """
    options, new_tokens = plan.method, plan.block.max_new_tokens
    if isinstance(options, BeamOptions):
        return [(options.beams, new_tokens)]
    if isinstance(options, ChunkOptions):
        return [(options.sampling.num_samples, new_tokens)]
    if not isinstance(options, SampleOptions):
        raise InputError(
            f"decode.method {plan.block.method} is not planned: what it computes depends on what the model answers; "
            "greedy, sample, beam, best_of_n and chunk are"
        )
    if plan.rejection:
        return plan.rejection.stages(options.num_samples, new_tokens)
    return [(options.num_samples, new_tokens)]


def search_trips(plan: DecodePlan) -> tuple[float, ...]:
    """Returns the trips of the loops of a search, the outer before the inner one, if no response ends early."""
    options, new_tokens = plan.method, plan.block.max_new_tokens
    if isinstance(options, BeamOptions):
        return (-(-new_tokens // block_size(new_tokens)),)
    if isinstance(options, ChunkOptions):
        return -(-new_tokens // options.chunk_length), options.chunk_length
    # Each stage has a loop; the first token is drawn before them.
    ends = [1, *(end for _, end in search_stages(plan))]
    return tuple(end - start for start, end in pairwise(ends))


def search_flops(model: CausalLM, prompts: int, prompt_length: int, stages: Sequence[tuple[int, int]]) -> float:
    """Counts the model FLOPs of a search: each prompt is read once, each new token but the last of each sequence too.

    Args:
        model: The model.
        prompts: Number of prompts.
        prompt_length: Tokens of each.
        stages: See `search_stages`.
    """
    forward = model.config.forward_flops
    flops = forward(tokens=prompts * prompt_length, scored_tokens=prompts, context=(prompt_length + 1) / 2)
    start = 1
    for sequences, end in stages:
        tokens = prompts * sequences * (end - start)
        flops += forward(tokens=tokens, scored_tokens=tokens, context=prompt_length + (start + end - 1) / 2)
        start = end
    return flops
