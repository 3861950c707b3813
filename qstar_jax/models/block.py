"""The one block of all decoders: attention and MLP with their norms, as `DecoderConfig` describes them."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qstar_jax._compat import nnx
from qstar_jax.config import ComputeOptions
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.lora import Linears, Lora
from qstar_jax.models.rope import Rotation, rotate

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

# What attention has read, for rematerialisation that keeps it.
ATTENDED = "attended"


class PlusOneRMSNorm(nnx.RMSNorm):
    """RMSNorm whose scale is stored less 1: with the 1 in it, bfloat16 would round away what was learned."""

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalises the last axis, in float32."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        scale = 1.0 + self.scale[...].astype(jnp.float32)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(self.dtype)


_NORMS = {
    "rms": nnx.RMSNorm,
    "rms_plus_one": partial(PlusOneRMSNorm, scale_init=nnx.initializers.zeros),
    # Its fast variance, mean(x^2) - mean(x)^2, loses digits where means are large.
    "layer": partial(nnx.LayerNorm, use_fast_variance=False),
}


class Parts:
    """Makes the parts of a model: all in its types, norms of its kind, linear layers with its adapter."""

    def __init__(self, config: DecoderConfig, compute: ComputeOptions, lora: Lora | None, rngs: nnx.Rngs):
        types = {"dtype": jnp.dtype(compute.dtype), "param_dtype": jnp.dtype(compute.param_dtype)}
        self.norm = partial(_NORMS[config.norm], epsilon=config.norm_eps, rngs=rngs, **types)
        self.embedding = partial(nnx.Embed, features=config.hidden_size, rngs=rngs, **types)
        self.linear = partial(Linears(lora, **types), rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: DecoderConfig, parts: Parts):
        self.config, width = config, config.hidden_size
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q = parts.linear("q_proj", width, heads, bias=config.qkv_bias)
        self.k = parts.linear("k_proj", width, kv_heads, bias=config.qkv_bias)
        self.v = parts.linear("v_proj", width, kv_heads, bias=config.qkv_bias)
        self.o = parts.linear("o_proj", heads, width, bias=config.o_bias)
        if config.qk_norm is not None:
            q_width, k_width = (heads, kv_heads) if config.qk_norm == "all" else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = parts.norm(q_width), parts.norm(k_width)

    def __call__(
        self,
        x: Float[Array, "N D"],
        batch: int,
        rotation: Rotation | None,
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "N D"]:
        """Attends from each token to those that it may see.

        Args:
            x: Inputs of the N = B * S tokens. Shape [N, D].
            batch: Rows of the batch, B.
            rotation: Cosines and sines of their positions; None: there are no rotary positions.
            attend: Function of queries [B, S, H, D], keys and values [B, S, G, D].

        Returns:
            Outputs. Shape [N, D].
        """
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.config.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rearrange(y, "(b s) (h d) -> b s h d", b=batch, d=self.config.head_dim) for y in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out = checkpoint_name(attend(q, k, v), ATTENDED)
        return self.o(rearrange(out, "b s h d -> (b s) (h d)"))


class MLP(nnx.Module):
    """Two linear layers with an activation between them, or three of which one is a gate."""

    def __init__(self, config: DecoderConfig, parts: Parts):
        self.config, width, hidden = config, config.hidden_size, config.intermediate_size
        if config.gated_mlp:
            self.gate = parts.linear("gate_proj", width, hidden, bias=config.mlp_bias)
        self.up = parts.linear("up_proj", width, hidden, bias=config.mlp_bias)
        self.down = parts.linear("down_proj", hidden, width, bias=config.mlp_bias)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """Applies the layers to N tokens."""
        activate = ACTIVATIONS[self.config.activation]
        return self.down(activate(self.gate(x)) * self.up(x) if self.config.gated_mlp else activate(self.up(x)))


class Block(nnx.Module):
    """One layer: attention and MLP, each with its norms, added to the stream."""

    def __init__(self, config: DecoderConfig, compute: ComputeOptions, lora: Lora | None, *, rngs: nnx.Rngs):
        self.config, parts = config, Parts(config, compute, lora, rngs)
        if config.norm_places in ("pre", "sandwich"):
            self.attention_norm, self.mlp_norm = parts.norm(config.hidden_size), parts.norm(config.hidden_size)
        if config.norm_places in ("post", "sandwich"):
            self.attention_out_norm, self.mlp_out_norm = parts.norm(config.hidden_size), parts.norm(config.hidden_size)
        self.attention, self.mlp = Attention(config, parts), MLP(config, parts)

    def __call__(self, x: Float[Array, "N D"], *attention_arguments) -> Float[Array, "N D"]:
        """Applies the layer to N tokens; the further arguments are those of `Attention`."""
        attended = x + self._attended(x, *attention_arguments)
        return attended + self._transformed(x if self.config.parallel_residual else attended)

    def _attended(self, x: Float[Array, "N D"], *attention_arguments) -> Float[Array, "N D"]:
        x = x if self.config.norm_places == "post" else self.attention_norm(x)
        x = self.attention(x, *attention_arguments)
        return x if self.config.norm_places == "pre" else self.attention_out_norm(x)

    def _transformed(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        x = self.mlp(x if self.config.norm_places == "post" else self.mlp_norm(x))
        return x if self.config.norm_places == "pre" else self.mlp_out_norm(x)
