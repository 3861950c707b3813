"""Parts that families of decoder-only transformers share: rotary positions, attention, gated MLP, cache."""

import math
from collections.abc import Callable
from dataclasses import dataclass
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, in buffers of fixed length.

    Attributes:
        keys: Shape [layers, B, K, kv_heads, head_dim].
        values: Shape [layers, B, K, kv_heads, head_dim].
    """

    keys: Float[Array, "L B K H D"]
    values: Float[Array, "L B K H D"]


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
        remember=lambda keys, values: (keys, values),
    ) -> Float[Array, "N D"]:
        """Attends from each of S positions to the K positions that it may see.

        Args:
            x: Inputs of the N = B * S tokens. Shape [N, D].
            positions: Rotary positions, in tokens. Shape [B, S].
            attend: What `masked_attention` makes of a mask.
            frequencies: Rotary frequencies. Shape [head_dim / 2].
            remember: Puts the S new keys and values into a cache and returns all K of them.

        Returns:
            Outputs. Shape [N, D].
        """
        batch, length = positions.shape
        q = self.q(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k(x).reshape(batch, length, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(batch, length, self.kv_heads, self.head_dim)
        k, v = remember(apply_rope(k, positions, frequencies), v)
        q = apply_rope(q, positions, frequencies)
        out = attend(q, k, v)
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
