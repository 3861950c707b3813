"""The decoding cache of each layer: keys and values of prompts, and of a pool of generated tokens."""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.models.attention import scale_and_cap
from qstar_jax.models.masks import MASKED

# Attention reads only the chunks of a pool that are in use. Each number of chunks compiles its own program, so there
# are at most MAX_CHUNKS, of at least MIN_CHUNK slots.
MAX_CHUNKS, MIN_CHUNK = 4, 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer: of the prompts, and of a pool of the tokens generated after them.

    Each prompt is stored once, however many responses continue it. The pool has no order: masks say which token follows
    which, so no beam or tree branch is ever copied.

    Attributes:
        prompt_keys: Shape [B, G, P, D], with a leading axis of layers when stacked; G groups of heads of width D.
        prompt_values: Shape [B, G, P, D].
        pool_keys: Shape [B, G, M, D].
        pool_values: Shape [B, G, M, D].
    """

    prompt_keys: Float[Array, "*L B G P D"]
    prompt_values: Float[Array, "*L B G P D"]
    pool_keys: Float[Array, "*L B G M D"]
    pool_values: Float[Array, "*L B G M D"]

    @classmethod
    def from_prompt(cls, keys: Float[Array, "B P G D"], values: Float[Array, "B P G D"], slots: int) -> "LayerCache":
        """Stores the keys and values of the prompts, with an empty pool of `slots` slots."""
        keys, values = (rearrange(x, "b p g d -> b g p d") for x in (keys, values))
        pool = jnp.zeros((*keys.shape[:2], slots, keys.shape[-1]), keys.dtype)
        return cls(keys, values, pool, pool)

    def layer(self, index: Int[Array, ""]) -> "LayerCache":
        """Returns one layer of a stack of caches."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), self)

    def update_layer(self, layer: "LayerCache", index: Int[Array, ""], slot: Int[Array, ""], count: int):
        """Copies `count` pool slots of `layer`, from `slot` on, into layer `index` of a stack of caches."""

        def put(stack: Array, pool: Array) -> Array:
            new = jax.lax.dynamic_slice_in_dim(pool, slot, count, axis=2)
            return jax.lax.dynamic_update_slice(stack, new[None], (index, 0, 0, slot, 0))

        keys, values = put(self.pool_keys, layer.pool_keys), put(self.pool_values, layer.pool_values)
        return replace(self, pool_keys=keys, pool_values=values)

    def reorder(self, slots: Int[Array, "B N"]) -> "LayerCache":
        """Permutes the pool: slot n of the result is slot `slots[:, n]` of this one."""
        index = slots[:, None, :, None]

        def move(pool: Array) -> Array:
            broadcast = index.reshape((1,) * (pool.ndim - index.ndim) + index.shape)
            return jnp.take_along_axis(pool, broadcast, axis=-2)

        return replace(self, pool_keys=move(self.pool_keys), pool_values=move(self.pool_values))

    def write(self, keys: Float[Array, "B K G D"], values: Float[Array, "B K G D"], slot: Int[Array, ""]):
        """Writes K new tokens into the pool, from `slot` on."""

        def put(pool: Array, new: Array) -> Array:
            new = rearrange(new, "b k g d -> b g k d").astype(pool.dtype)
            return jax.lax.dynamic_update_slice(pool, new, (0, 0, slot, 0))

        return replace(self, pool_keys=put(self.pool_keys, keys), pool_values=put(self.pool_values, values))

    def attend(
        self,
        q: Float[Array, "B K H D"],
        prompt_mask: Bool[Array, "B _ P"],
        path_mask: Bool[Array, "B K M"],
        used: Int[Array, ""],
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Float[Array, "B K H D"]:
        """Attends from K tokens per prompt to their prompt and to their own paths in the pool, in one softmax.

        Each token is multiplied with all of the first `used` pool slots (rounded up to a chunk), and the mask keeps the
        paths apart: K times the necessary products, but as plain matrix products that move no key (bifurcated
        attention, arXiv 2403.08845).

        Args:
            q: Queries. Shape [B, K, H, D].
            prompt_mask: True at the prompt tokens visible to each query, or to all K. Shape [B, K or 1, P].
            path_mask: True at the pool slots visible to each query. Shape [B, K, M].
            used: Number of pool slots in use.
            scale: Multiplies the scores.
            softcap: Scores s become softcap * tanh(s / softcap).

        Returns:
            Outputs. Shape [B, K, H, D].
        """
        # The possible sizes of the prefix of the pool that attention reads.
        slots = self.pool_keys.shape[2]
        chunks = min(max(slots // MIN_CHUNK, 1), MAX_CHUNKS)
        sizes = [math.ceil(slots * chunk / chunks) for chunk in range(1, chunks + 1)]

        def attend_to(size: int, q, prompt_mask, path_mask, cache: "LayerCache"):
            prefix = replace(cache, pool_keys=cache.pool_keys[:, :, :size], pool_values=cache.pool_values[:, :, :size])
            return prefix._attend(q, prompt_mask, path_mask[..., :size], scale, softcap)

        # Run the smallest one that holds all used slots.
        index = jnp.searchsorted(jnp.array(sizes), used)
        return jax.lax.switch(index, [partial(attend_to, size) for size in sizes], q, prompt_mask, path_mask, self)

    def _attend(
        self,
        q: Float[Array, "B K H D"],
        prompt_mask: Bool[Array, "B _ P"],
        path_mask: Bool[Array, "B K M"],
        scale: float,
        softcap: float | None,
    ) -> Float[Array, "B K H D"]:
        # The K tokens and the heads of a group become the rows of one matrix per group.
        groups = self.prompt_keys.shape[1]
        q = rearrange(q, "b k (g h) d -> b g (k h) d", g=groups)
        heads_per_group = q.shape[2] // path_mask.shape[1]

        def scores(keys: Array, mask: Array) -> Array:
            products = jnp.einsum("bgqd,bgsd->bgqs", q, keys, preferred_element_type=jnp.float32)
            mask = mask if mask.shape[1] == 1 else jnp.repeat(mask, heads_per_group, axis=1)
            return jnp.where(mask[:, None], scale_and_cap(products, scale, softcap), MASKED)

        # One softmax over prompt and path without concatenating them: a common maximum and a common sum.
        on_prompt, on_path = scores(self.prompt_keys, prompt_mask), scores(self.pool_keys, path_mask)
        maximum = jnp.maximum(on_prompt.max(-1), on_path.max(-1))[..., None]
        on_prompt, on_path = jnp.exp(on_prompt - maximum), jnp.exp(on_path - maximum)
        total = on_prompt.sum(-1, keepdims=True) + on_path.sum(-1, keepdims=True)
        # Average the values, normalizing last.
        out = sum(
            jnp.einsum("bgqs,bgsd->bgqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
            for weights, values in ((on_prompt, self.prompt_values), (on_path, self.pool_values))
        )
        return rearrange((out / total).astype(q.dtype), "b g (k h) d -> b k (g h) d", h=heads_per_group)
