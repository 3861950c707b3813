"""The transformer block shared by all families: attention and MLP with their norms, as `DecoderConfig` describes."""

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
from qstar_jax.models.lora import LinearFactory, Lora
from qstar_jax.models.rope import Rotation, rotate

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

# Checkpoint name of the output of attention, which `compute.remat attention` saves.
ATTENTION_OUT = "attention_out"


class PlusOneRMSNorm(nnx.RMSNorm):
    """RMSNorm that stores its scale minus 1, which loses less to rounding in bfloat16."""

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalizes the last axis in float32."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        scale = 1.0 + self.scale[...].astype(jnp.float32)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(self.dtype)


_NORMS = {
    "rms": nnx.RMSNorm,
    "rms_plus_one": partial(PlusOneRMSNorm, scale_init=nnx.initializers.zeros),
    # The fast variance, mean(x^2) - mean(x)^2, loses precision where means are large.
    "layer": partial(nnx.LayerNorm, use_fast_variance=False),
}


class ModuleFactory:
    """Makes the modules of a model: norms, embeddings and (adapted) linear layers, all in its dtypes."""

    def __init__(self, config: DecoderConfig, compute: ComputeOptions, lora: Lora | None, rngs: nnx.Rngs):
        dtypes = {"dtype": jnp.dtype(compute.dtype), "param_dtype": jnp.dtype(compute.param_dtype)}
        self.norm = partial(_NORMS[config.norm], epsilon=config.norm_eps, rngs=rngs, **dtypes)
        self.embedding = partial(nnx.Embed, features=config.hidden_size, rngs=rngs, **dtypes)
        self.linear = partial(LinearFactory(lora, **dtypes), rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: DecoderConfig, make: ModuleFactory):
        self.config, width = config, config.hidden_size
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q = make.linear("q_proj", width, heads, bias=config.qkv_bias)
        self.k = make.linear("k_proj", width, kv_heads, bias=config.qkv_bias)
        self.v = make.linear("v_proj", width, kv_heads, bias=config.qkv_bias)
        self.o = make.linear("o_proj", heads, width, bias=config.o_bias)
        if config.qk_norm is not None:
            q_width, k_width = (heads, kv_heads) if config.qk_norm == "all" else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = make.norm(q_width), make.norm(k_width)

    def __call__(
        self,
        x: Float[Array, "N D"],
        batch: int,
        rotation: Rotation | None,
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "N D"]:
        """Applies attention to N = B * S tokens.

        Args:
            x: Inputs. Shape [N, D].
            batch: Number of sequences, B.
            rotation: Cosines and sines of the positions; None: no rotary positions.
            attend: Function of queries [B, S, H, D], keys and values [B, S, G, D].

        Returns:
            Outputs. Shape [N, D].
        """
        # Project, with a norm over all heads together (OLMo 2) or over each head (Qwen 3, Gemma 3).
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.config.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rearrange(y, "(b s) (h d) -> b s h d", b=batch, d=self.config.head_dim) for y in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        # Rotate after the norms, as all families do.
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        # The caller supplies attention itself: it may read a cache.
        out = checkpoint_name(attend(q, k, v), ATTENTION_OUT)
        return self.o(rearrange(out, "b s h d -> (b s) (h d)"))


class MLP(nnx.Module):
    """Two linear layers with an activation in between, or the gated variant with three (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, make: ModuleFactory):
        self.config, width, hidden = config, config.hidden_size, config.intermediate_size
        if config.gated_mlp:
            self.gate = make.linear("gate_proj", width, hidden, bias=config.mlp_bias)
        self.up = make.linear("up_proj", width, hidden, bias=config.mlp_bias)
        self.down = make.linear("down_proj", hidden, width, bias=config.mlp_bias)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """Applies the MLP to N tokens."""
        activate = ACTIVATIONS[self.config.activation]
        return self.down(activate(self.gate(x)) * self.up(x) if self.config.gated_mlp else activate(self.up(x)))


class Block(nnx.Module):
    """One layer: attention and MLP, each with its norms, added to the residual stream."""

    def __init__(self, config: DecoderConfig, compute: ComputeOptions, lora: Lora | None, *, rngs: nnx.Rngs):
        self.config, make = config, ModuleFactory(config, compute, lora, rngs)
        if config.norm_placement in ("pre", "sandwich"):
            self.attention_norm, self.mlp_norm = make.norm(config.hidden_size), make.norm(config.hidden_size)
        if config.norm_placement in ("post", "sandwich"):
            self.attention_out_norm, self.mlp_out_norm = make.norm(config.hidden_size), make.norm(config.hidden_size)
        self.attention, self.mlp = Attention(config, make), MLP(config, make)

    def __call__(self, x: Float[Array, "N D"], *attention_args) -> Float[Array, "N D"]:
        """Applies the layer to N tokens; the other arguments are passed to `Attention`."""
        residual = x + self._attention_branch(x, *attention_args)
        # With parallel residuals, the MLP reads what attention read, not its output.
        return residual + self._mlp_branch(x if self.config.parallel_residual else residual)

    def _attention_branch(self, x: Float[Array, "N D"], *attention_args) -> Float[Array, "N D"]:
        x = x if self.config.norm_placement == "post" else self.attention_norm(x)
        x = self.attention(x, *attention_args)
        return x if self.config.norm_placement == "pre" else self.attention_out_norm(x)

    def _mlp_branch(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        x = self.mlp(x if self.config.norm_placement == "post" else self.mlp_norm(x))
        return x if self.config.norm_placement == "pre" else self.mlp_out_norm(x)
