"""What a search for responses needs on GPUs for which nothing can be compiled here; see `estimate`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from qstar_jax.config import MeshOptions
from qstar_jax.decoding.options import DecodePlan
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.plan.decode import new_tokens_of, padded_length, search_flops, search_stages
from qstar_jax.plan.estimate import MOVED, bytes_per_slot, itemsize, totals
from qstar_jax.plan.needs import Needs
from qstar_jax.store.checkpoints import abstract_with_shardings
from qstar_jax.store.open import param_shardings
from qstar_jax.training.diagnostics.estimate import bytes_on_device

# Fitted, as in `estimate`.
LOGITS_LIVE, LOGITS_MOVED = 2, 12  # arrays of logits, alive, and written or read, in a step
SCORES_MOVED = 6  # arrays of attention scores, written or read, per layer and step


def estimate_search(
    models: Sequence[CausalLM],
    plan: DecodePlan,
    prompts: int,
    prompt_length: int,
    mesh: AbstractMesh,
    options: MeshOptions,
) -> Needs:
    """Estimates the needs of a search; arguments as for `decode.lower_search`.

    Raises:
        InputError: If the method's programs cannot be known beforehand, or parameters are sharded over `fsdp`.
    """
    if mesh.shape["fsdp"] > 1:
        raise InputError(
            f"mesh fsdp={mesh.shape['fsdp']}: of decoding with parameters sharded so, nothing is estimated, as the "
            "compiler decides what travels; shard them over mesh.tensor"
        )
    stages, count = search_stages(plan), prompts if plan.batched else 1
    shards, searches = mesh.shape["data"], []
    for model in models:
        params = abstract_with_shardings(model.abstract_params(), param_shardings(model, mesh, options))
        rows = count / shards if count % shards == 0 else count
        searches.append(
            _Search(model, bytes_on_device(params), rows, padded_length(prompt_length), stages, mesh.shape["tensor"])
        )
    memory = {name: int(sum(search.memory[name] for search in searches)) for name in searches[0].memory}
    memory = {name: size for name, size in memory.items() if size}
    arguments = memory["parameters"] + 4 * count * (padded_length(prompt_length) + 1)
    flops = sum(search_flops(model, count, prompt_length, stages) for model in models) / math.prod(mesh.shape.values())
    sums = [search.sums for search in searches]
    transfers = {key: float(sum(x[key] for x in sums)) for key in ("count", "bytes")}
    return Needs(
        memory=memory | totals(arguments, sum(memory.values()) - memory["parameters"]),
        flops={"needed": flops, "program": sum(search.flops for search in searches)},
        collectives={"all-reduce": transfers} if mesh.shape["tensor"] > 1 else {},
        memory_traffic=sum(search.traffic for search in searches),
        tokens=new_tokens_of(plan, count),
    )


@dataclass(frozen=True)
class _Search:
    """What one model of a search needs on a device.

    Attributes:
        model: The model.
        weights: Bytes of its parameters there.
        rows: Prompts there.
        prompt_length: Slots of each.
        stages: See `decode.search_stages`.
        tensor: Devices that share a row.
    """

    model: CausalLM
    weights: int
    rows: float
    prompt_length: int
    stages: Sequence[tuple[int, int]]
    tensor: int

    @property
    def sequences(self) -> int:
        """Sequences per prompt, at most."""
        return max(sequences for sequences, _ in self.stages)

    @property
    def slots(self) -> int:
        """Slots of a prompt, and of the pool of new tokens behind it."""
        return self.prompt_length + max(sequences * end for sequences, end in self.stages)

    @property
    def memory(self) -> dict[str, float]:
        """Bytes, by what they hold."""
        # Prompts are read before there are logits; the larger of the two counts.
        prompts = bytes_per_slot(self.model, self.tensor) * self.rows * self.prompt_length
        table = self.model.config.vocab_size * self.model.config.hidden_size * itemsize(self.model) / self.tensor
        return {
            "parameters": self.weights,
            "keys and values": self._cache,
            "activations": max(prompts, LOGITS_LIVE * self._logits),
            "table of the head, cast": table if self._is_cast else 0,
        }

    @property
    def traffic(self) -> float:
        """Bytes that are read and written: the prompts' layers once, and for each token weights, cache and scores."""
        config, steps = self.model.config, self.stages[-1][1]
        # Weights of another dtype than that of the products are cast for each token.
        casts = 2 * itemsize(self.model) / jnp.dtype(self.model.compute.param_dtype).itemsize if self._is_cast else 0
        scores = 4 * self.rows * self._heads * self.sequences * self.slots * config.num_hidden_layers
        per_step = (1 + casts) * self.weights + 2 * self._cache + SCORES_MOVED * scores + LOGITS_MOVED * self._logits
        prompt_slots = self.rows * self.prompt_length * config.num_hidden_layers
        return steps * per_step + MOVED * bytes_per_slot(self.model, self.tensor) * prompt_slots

    @property
    def sums(self) -> dict[str, float]:
        """Sums of activations along `tensor`: two per layer, for the prompts and for each token."""
        config, steps = self.model.config, self.stages[-1][1]
        tokens = self.rows * (self.prompt_length + sum(self._tokens_per_stage))
        nbytes = 2 * config.num_hidden_layers * tokens * config.hidden_size * itemsize(self.model)
        return {
            "count": 2 * config.num_hidden_layers * (1 + steps),
            "bytes": nbytes * 2 * (self.tensor - 1) / self.tensor,
        }

    @property
    def flops(self) -> float:
        """FLOPs of the program: prompts with their padding, and tokens that see all slots of the pool."""
        forward = self.model.config.forward_flops
        prompt_slots, tokens = self.rows * self.prompt_length, self.rows * sum(self._tokens_per_stage)
        flops = forward(tokens=prompt_slots, scored_tokens=self.rows, context=self.prompt_length / 2)
        return (flops + forward(tokens=tokens, scored_tokens=tokens, context=self.slots)) / self.tensor

    @property
    def _is_cast(self) -> bool:
        return self.model.compute.param_dtype != self.model.compute.dtype

    @property
    def _tokens_per_stage(self) -> list[int]:
        starts = [0, *(end for _, end in self.stages)]
        return [sequences * (end - start) for (sequences, end), start in zip(self.stages, starts, strict=False)]

    @property
    def _heads(self) -> float:
        return self.model.config.num_attention_heads / self._head_shards

    @property
    def _head_shards(self) -> int:
        return self.tensor if self.model.config.num_key_value_heads % self.tensor == 0 else 1

    @property
    def _cache(self) -> float:
        config = self.model.config
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize(self.model)
        return self.rows * self.slots * width / self._head_shards

    @property
    def _logits(self) -> float:
        return 4 * self.rows * self.sequences * self.model.config.vocab_size / self.tensor
