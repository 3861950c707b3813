"""What decoding keeps of each layer: keys and values of prompts, and of a pool of tokens that follow them."""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.models.attention import scores_of
from qstar_jax.models.masks import MASKED

# Parts of a pool that attention can leave out while they are empty; each is a program more to compile, so a pool is cut
# only where a part has this many slots.
POOL_PARTS, PART = 4, 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values that one layer keeps for decoding: of prompts, and of a pool of tokens that follow them.

    Prompts are kept once, however many answers go on from them. The pool is not ordered: who follows whom is said by
    masks, so that no beam or branch of a tree is ever copied.

    Attributes:
        prompt_keys: Shape [B, kv_heads, P, head_dim], in a stack with the layers before it.
        prompt_values: Shape [B, kv_heads, P, head_dim].
        pool_keys: Shape [B, kv_heads, M, head_dim].
        pool_values: Shape [B, kv_heads, M, head_dim].
    """

    prompt_keys: Float[Array, "*L B G P D"]
    prompt_values: Float[Array, "*L B G P D"]
    pool_keys: Float[Array, "*L B G M D"]
    pool_values: Float[Array, "*L B G M D"]

    @classmethod
    def of_prompt(cls, keys: Float[Array, "B P G D"], values: Float[Array, "B P G D"], slots: int) -> "LayerCache":
        """Keeps a prompt's keys and values, and makes an empty pool of so many slots."""
        keys, values = (rearrange(x, "b p g d -> b g p d") for x in (keys, values))
        pool = jnp.zeros((*keys.shape[:2], slots, keys.shape[-1]), keys.dtype)
        return cls(keys, values, pool, pool)

    def layer(self, index: Int[Array, ""]) -> "LayerCache":
        """One layer of a stack of caches."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), self)

    def with_slots_of(self, layer: "LayerCache", index: Int[Array, ""], slot: Int[Array, ""], count: int):
        """A stack of caches in which `count` slots of the pool of one layer are those of `layer`."""

        def put(stack: Array, pool: Array) -> Array:
            new = jax.lax.dynamic_slice_in_dim(pool, slot, count, axis=2)
            return jax.lax.dynamic_update_slice(stack, new[None], (index, 0, 0, slot, 0))

        keys, values = put(self.pool_keys, layer.pool_keys), put(self.pool_values, layer.pool_values)
        return replace(self, pool_keys=keys, pool_values=values)

    def reorder(self, slots: Int[Array, "B N"]) -> "LayerCache":
        """A pool whose slot n is the present slot `slots[:, n]`."""
        index = slots[:, None, :, None]

        def move(pool: Array) -> Array:
            own = index.reshape((1,) * (pool.ndim - index.ndim) + index.shape)
            return jnp.take_along_axis(pool, own, axis=-2)

        return replace(self, pool_keys=move(self.pool_keys), pool_values=move(self.pool_values))

    def write(self, keys: Float[Array, "B K G D"], values: Float[Array, "B K G D"], slot: Int[Array, ""]):
        """Puts K new tokens into the pool's slots `slot` and on."""

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
        """Attention of K tokens a prompt to their prompt and to their own pasts in the pool, in one softmax.

        All tokens of a prompt meet all of the `used` first slots of its pool (rounded up to a part of it), and the mask
        keeps paths apart: K times the products that are needed, but plain matrices, and no key is moved (bifurcated
        attention, arXiv 2403.08845).

        Args:
            q: Queries. Shape [B, K, H, D].
            prompt_mask: True at the prompt's tokens that each query may see, or all K may. Shape [B, K or 1, P].
            path_mask: True at the slots of the pool that each query may see. Shape [B, K, M].
            used: Slots of the pool behind which there is nothing.
            scale: Factor of the scores.
            softcap: Scores s become softcap * tanh(s / softcap).

        Returns:
            Outputs. Shape [B, K, H, D].
        """
        slots = self.pool_keys.shape[2]
        parts = min(max(slots // PART, 1), POOL_PARTS)
        sizes = [math.ceil(slots * part / parts) for part in range(1, parts + 1)]

        def attend_to(size: int, q, prompt_mask, path_mask, cache: "LayerCache"):
            used = replace(cache, pool_keys=cache.pool_keys[:, :, :size], pool_values=cache.pool_values[:, :, :size])
            return used._attend(q, prompt_mask, path_mask[..., :size], scale, softcap)

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
        groups = self.prompt_keys.shape[1]
        q = rearrange(q, "b k (g h) d -> b g (k h) d", g=groups)
        share = q.shape[2] // path_mask.shape[1]

        def scores(keys: Array, mask: Array) -> Array:
            found = jnp.einsum("bgqd,bgsd->bgqs", q, keys, preferred_element_type=jnp.float32)
            mask = mask if mask.shape[1] == 1 else jnp.repeat(mask, share, axis=1)
            return jnp.where(mask[:, None], scores_of(found, scale, softcap), MASKED)

        on_prompt, on_path = scores(self.prompt_keys, prompt_mask), scores(self.pool_keys, path_mask)
        highest = jnp.maximum(on_prompt.max(-1), on_path.max(-1))[..., None]
        on_prompt, on_path = jnp.exp(on_prompt - highest), jnp.exp(on_path - highest)
        total = on_prompt.sum(-1, keepdims=True) + on_path.sum(-1, keepdims=True)
        out = sum(
            jnp.einsum("bgqs,bgsd->bgqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
            for weights, values in ((on_prompt, self.prompt_values), (on_path, self.pool_values))
        )
        return rearrange((out / total).astype(q.dtype), "b g (k h) d -> b k (g h) d", h=share)
