"""Parts that families of decoder-only transformers share: rotary positions, attention, gated MLP, cache."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax._compat import nnx


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


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, without biases."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.q = linear(width, heads * head_dim)
        self.k = linear(width, kv_heads * head_dim)
        self.v = linear(width, kv_heads * head_dim)
        self.o = linear(heads * head_dim, width)

    def __call__(
        self,
        x: Float[Array, "N D"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S K"],
        frequencies: Float[Array, " F"],
        remember=lambda keys, values: (keys, values),
    ) -> Float[Array, "N D"]:
        """Attends from each of S positions to the K positions that `mask` allows.

        Args:
            x: Inputs of the N = B * S tokens. Shape [N, D].
            positions: Rotary positions, in tokens. Shape [B, S].
            mask: True where a query (second axis) may see a key (third axis). Shape [B, S, K].
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
        out = jax.nn.dot_product_attention(apply_rope(q, positions, frequencies), k, v, mask=mask[:, None])
        return self.o(out.reshape(batch * length, -1))


class GatedMLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), without biases (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.gate, self.up = linear(width, hidden), linear(width, hidden)
        self.down = linear(hidden, width)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """Applies the layer to N tokens."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
