"""Parts that families of decoder-only transformers share: rotary positions, attention, gated MLP, cache."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qstar_jax._compat import nnx
from qstar_jax.models.flash_attention import flash_attention
from qstar_jax.models.lora import Lora, LoraLinear

# What attention has read, for rematerialisation that keeps it.
ATTENDED = "attended"

# A score that no softmax sees; finite, as gradients of infinities are NaN.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

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
        prompt_mask: Bool[Array, "B P"],
        path_mask: Bool[Array, "B K M"],
        used: Int[Array, ""],
    ) -> Float[Array, "B K H D"]:
        """Attention of K tokens a prompt to their prompt and to their own pasts in the pool, in one softmax.

        All tokens of a prompt meet all of the `used` first slots of its pool (rounded up to a part of it), and the mask
        keeps paths apart: K times the products that are needed, but plain matrices, and no key is moved (bifurcated
        attention, arXiv 2403.08845).
        """
        slots = self.pool_keys.shape[2]
        parts = min(max(slots // PART, 1), POOL_PARTS)
        sizes = [math.ceil(slots * part / parts) for part in range(1, parts + 1)]

        def attend_to(size: int, q, prompt_mask, path_mask, cache: "LayerCache"):
            used = replace(cache, pool_keys=cache.pool_keys[:, :, :size], pool_values=cache.pool_values[:, :, :size])
            return used._attend(q, prompt_mask, path_mask[..., :size])

        index = jnp.searchsorted(jnp.array(sizes), used)
        return jax.lax.switch(index, [partial(attend_to, size) for size in sizes], q, prompt_mask, path_mask, self)

    def _attend(
        self, q: Float[Array, "B K H D"], prompt_mask: Bool[Array, "B P"], path_mask: Bool[Array, "B K M"]
    ) -> Float[Array, "B K H D"]:
        groups, width = self.prompt_keys.shape[1], q.shape[-1]
        q = rearrange(q, "b k (g h) d -> b g (k h) d", g=groups)
        share = q.shape[2] // path_mask.shape[1]

        def scores(keys: Array, mask: Array) -> Array:
            found = jnp.einsum("bgqd,bgsd->bgqs", q, keys, preferred_element_type=jnp.float32)
            return jnp.where(mask[:, None], found / math.sqrt(width), _MASKED)

        on_prompt = scores(self.prompt_keys, prompt_mask[:, None])
        on_path = scores(self.pool_keys, jnp.repeat(path_mask, share, axis=1))
        highest = jnp.maximum(on_prompt.max(-1), on_path.max(-1))[..., None]
        on_prompt, on_path = jnp.exp(on_prompt - highest), jnp.exp(on_path - highest)
        total = on_prompt.sum(-1, keepdims=True) + on_path.sum(-1, keepdims=True)
        out = sum(
            jnp.einsum("bgqs,bgsd->bgqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
            for weights, values in ((on_prompt, self.prompt_values), (on_path, self.pool_values))
        )
        return rearrange((out / total).astype(q.dtype), "b g (k h) d -> b k (g h) d", h=share)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowMask:
    """Who may see whom in rows that hold several prompts and answers: causal, within a block, answers kept apart.

    Attributes:
        blocks: Block of each slot; -1 for padding, which sees padding only. Shape [B, S].
        branches: 0 for what a block's answers share, otherwise the answer's number. Shape [B, S].
    """

    blocks: Int[Array, "B S"]
    branches: Int[Array, "B S"]

    def between(self, queries: Int[Array, "B Q 3"]) -> Bool[Array, "B Q S"]:
        """Mask of some queries, given as (slot, block, branch) each, and all keys."""
        slot, block, branch = queries[..., None, 0], queries[..., None, 1], queries[..., None, 2]
        keys, branches = self.blocks[:, None, :], self.branches[:, None, :]
        causal = jnp.arange(self.blocks.shape[1]) <= slot
        return causal & (keys == block) & ((branches == 0) | (branches == branch))

    def queries(self) -> Int[Array, "B S 3"]:
        """The (slot, block, branch) of every slot."""
        slots = jnp.broadcast_to(jnp.arange(self.blocks.shape[1]), self.blocks.shape)
        return jnp.stack([slots, self.blocks, self.branches], axis=-1)

    def dense(self) -> Bool[Array, "B S S"]:
        """The whole mask."""
        return self.between(self.queries())


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "llama3" only the low ones, with a smooth passage.
        factor: The stretch.
        low_freq_factor: Wavelengths above original_max_position_embeddings / low_freq_factor are stretched fully.
        high_freq_factor: Those below original_max_position_embeddings / high_freq_factor are left alone.
        original_max_position_embeddings: Context length before the stretch, in tokens.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Float[Array, " F"]:
    """Rotary frequencies in radians a token, for the head_dim / 2 pairs of dimensions (arXiv 2104.09864).

    Args:
        head_dim: Width of a head.
        theta: Base of the geometric series.
        scaling: Stretch for long contexts.

    Returns:
        Frequencies. Shape [head_dim / 2].
    """
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def apply_rope(
    x: Float[Array, "B S H D"], positions: Int[Array, "B S"], frequencies: Float[Array, " F"]
) -> Float[Array, "B S H D"]:
    """Rotates each head's two halves (dimension i with i + D/2, as Hugging Face stores Llama) by its position."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def blockwise_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G D"],
    mask: RowMask,
    *,
    block_size: int = 128,
) -> Float[Array, "B S H D"]:
    """Attention whose scores exist for `block_size` queries at a time, and again in the backward pass.

    Neither the [B, H, S, S] scores nor the [B, S, S] mask is ever built: memory grows with S * block_size.

    Args:
        q: Queries. Shape [B, S, H, D].
        k: Keys, in G groups of heads. Shape [B, S, G, D].
        v: Values. Shape [B, S, G, D].
        mask: Who may see whom.
        block_size: Queries of a row whose scores exist at one time.

    Returns:
        Outputs. Shape [B, S, H, D].
    """
    # One row and group of heads after the other gives products of plain matrices, which a CPU multiplies several times
    # faster; but rows that lie on several devices must be computed side by side.
    by_row = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    return (_attend_row_by_row if by_row else _attend_side_by_side)(q, k, v, mask, block_size)


def masked_attention(mask: Bool[Array, "B S K"] | RowMask, option: str) -> Callable[[Array, Array, Array], Array]:
    """Turns a mask and `compute.attention` into attention: the one place that chooses how it is computed.

    Args:
        mask: True where a query (second axis) may see a key (third axis), which is always computed densely; or a
            `RowMask`, which is computed as `option` says.
        option: `compute.attention`.

    Returns:
        Function of queries [B, S, H, D], keys and values [B, K, G, D] that gives outputs [B, S, H, D].
    """
    if option == "auto":
        option = "flash" if jax.default_backend() == "tpu" else "blockwise"
    if isinstance(mask, RowMask) and option == "dense":
        mask = mask.dense()
    if isinstance(mask, RowMask):
        return partial({"blockwise": blockwise_attention, "flash": flash_attention}[option], mask=mask)
    return partial(jax.nn.dot_product_attention, mask=mask[:, None])


def _attend_row_by_row(q: Array, k: Array, v: Array, mask: RowMask, block_size: int) -> Array:
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    share = heads // groups
    q = rearrange(q, "b s (g h) d -> (b g) h s d", g=groups)
    k, v = (rearrange(x, "b s g d -> (b g) s d") for x in (k, v))
    queries = jnp.repeat(mask.queries(), groups, axis=0)

    @jax.checkpoint
    def attend(row: tuple[Array, ...]) -> Array:
        q, k, v, queries = row
        outputs = []
        for start in range(0, length, block_size):
            # Keys after the block are not even multiplied.
            stop = min(start + block_size, length)
            block = rearrange(q[:, start:stop], "h s d -> (h s) d")
            scores = jnp.matmul(block, k[:stop].T, preferred_element_type=jnp.float32) / math.sqrt(width)
            own = RowMask(queries[None, :stop, 1], queries[None, :stop, 2]).between(queries[None, start:stop])[0]
            scores = jnp.where(own, scores.reshape(share, stop - start, stop), _MASKED)
            weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(-1, stop)
            outputs.append((weights @ v[:stop]).reshape(share, stop - start, width))
        return jnp.concatenate(outputs, axis=1)

    out = jax.lax.map(attend, (q, k, v, queries))
    return rearrange(out, "(b g) h s d -> b s (g h) d", b=batch)


def _attend_side_by_side(q: Array, k: Array, v: Array, mask: RowMask, block_size: int) -> Array:
    batch, length, heads, width = q.shape
    block_size = min(block_size, length)
    blocks = -(-length // block_size)
    padding = ((0, 0), (0, blocks * block_size - length))

    def cut(x: Array) -> Array:
        x = jnp.pad(x, padding + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, blocks, block_size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def attend(block: tuple[Array, Array]) -> Array:
        q, queries = block
        return jax.nn.dot_product_attention(q, k, v, mask=mask.between(queries)[:, None])

    out = jax.lax.map(attend, (cut(q), cut(mask.queries())))
    return out.swapaxes(0, 1).reshape(batch, -1, heads, width)[:, :length]


@dataclass(frozen=True)
class Linears:
    """How a model's linear layers are made: without biases, and with an adapter where one is asked for.

    Attributes:
        lora: Adapter of the layers that it names; None: plain layers.
        dtype: Type of the products.
        param_dtype: Type in which kernels are stored.
    """

    lora: Lora | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def __call__(self, name: str, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
        """Makes the layer that Hugging Face calls `name`."""
        common = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        if self.lora is not None and name in self.lora.targets:
            return LoraLinear(inputs, outputs, self.lora, **common)
        return nnx.Linear(inputs, outputs, **common)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, linear: Linears, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q = linear("q_proj", width, heads * head_dim, rngs)
        self.k = linear("k_proj", width, kv_heads * head_dim, rngs)
        self.v = linear("v_proj", width, kv_heads * head_dim, rngs)
        self.o = linear("o_proj", heads * head_dim, width, rngs)

    def __call__(
        self,
        x: Float[Array, "N D"],
        positions: Int[Array, "B S"],
        attend: Callable[[Array, Array, Array], Array],
        frequencies: Float[Array, " F"],
    ) -> Float[Array, "N D"]:
        """Attends from each of S positions to the positions that it may see.

        Args:
            x: Inputs of the N = B * S tokens. Shape [N, D].
            positions: Rotary positions, in tokens. Shape [B, S].
            attend: Function of queries [B, S, H, D], keys and values [B, S, G, D], as `masked_attention` makes it.
            frequencies: Rotary frequencies. Shape [head_dim / 2].

        Returns:
            Outputs. Shape [N, D].
        """
        batch, length = positions.shape
        q = self.q(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k(x).reshape(batch, length, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(batch, length, self.kv_heads, self.head_dim)
        out = attend(apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies), v)
        return self.o(checkpoint_name(out, ATTENDED).reshape(batch * length, -1))


class GatedMLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, linear: Linears, *, rngs: nnx.Rngs):
        self.gate = linear("gate_proj", width, hidden, rngs)
        self.up = linear("up_proj", width, hidden, rngs)
        self.down = linear("down_proj", hidden, width, rngs)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """Applies the layer to N tokens."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
