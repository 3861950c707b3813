"""The Llama family: RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from qstar_jax._compat import nnx
from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.head import Head
from qstar_jax.models.config_keys import check_keys
from qstar_jax.models.layers import (
    ATTENDED,
    Attention,
    GatedMLP,
    LayerCache,
    Linears,
    RopeScaling,
    RowMask,
    masked_attention,
    rope_frequencies,
)
from qstar_jax.models.lora import Lora
from qstar_jax.sharding import constrain_batch

LayerCaches = LayerCache | tuple[LayerCache, ...]  # one with a leading axis of layers, or one a layer

# The rule of largest dimensions cuts q, k, v by outputs; their counterpart o is cut by inputs, to need one sum a layer.
SHARDING_OVERRIDES = {r"layers/attention/o/kernel$": (None, "tensor", "fsdp")}

POSITIONS = "rotary"  # or "learned": then there is no vector behind max_position_embeddings

# Tensors of older files that are computed from config.json, here as in transformers.
HARMLESS_TENSORS = r"(^|\.)rotary_emb\.inv_freq$"

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_BUILT = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
}
_ROPE_KEYS = {  # kind of scaling -> its parameters
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama model, under the names that Hugging Face's config.json gives."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "LlamaConfig":
        """Reads the dictionary of a config.json.

        Raises:
            InputError: If a key is missing, sizes do not fit each other, or the model has a part that is not built here
                (biases, another activation function, another scaling of rotary positions, a key that is not known).
        """
        check_keys(config, read={*cls.__dataclass_fields__, "rope_parameters"}, built=_BUILT)
        try:
            sizes = {name: config[name] for name in _SIZES}
        except KeyError as error:
            raise InputError(f"config.json: no key {error} (found: {', '.join(sorted(config))})") from None
        heads = sizes["num_attention_heads"]
        sizes["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        sizes["max_position_embeddings"] = config.get("max_position_embeddings", cls.max_position_embeddings)
        _check_sizes(sizes, config.get("head_dim"))
        rope = _rope_parameters(config)
        numbers = {
            "rms_norm_eps": config.get("rms_norm_eps", cls.rms_norm_eps),
            "rope_theta": rope.get("rope_theta") or config.get("rope_theta") or cls.rope_theta,
        }
        tied = config.get("tie_word_embeddings") or False
        _check_values(numbers, tied)
        return cls(
            **sizes,
            **numbers,
            head_dim=config.get("head_dim") or sizes["hidden_size"] // heads,
            rope_scaling=_rope_scaling(rope),
            tie_word_embeddings=tied,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the dictionary of a config.json that `from_hf` and transformers read."""
        scaling = self.rope_scaling
        rope_scaling = None
        if scaling is not None:
            rope_scaling = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling is not None and scaling.kind == "llama3":
            rope_scaling |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
        shape = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rope_scaling"}
        fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **shape,
            "rope_scaling": rope_scaling,
            **fixed,
        }


def _check_sizes(sizes: dict[str, Any], head_dim: Any):
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise InputError(f"config.json: {name} is {size!r}; expected a whole number of at least 1")
    heads, groups, width = (sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads % groups:
        raise InputError(f"config.json: {groups} num_key_value_heads do not divide {heads} num_attention_heads")
    if not head_dim and width % heads:
        raise InputError(f"config.json: {heads} num_attention_heads do not divide hidden_size {width}; give head_dim")


def _check_values(numbers: dict[str, Any], tied: Any):
    for name, number in numbers.items():
        if type(number) not in (int, float) or not number > 0:
            raise InputError(f"config.json: {name} is {number!r}; expected a number above 0")
    if type(tied) is not bool:
        raise InputError(f"config.json: tie_word_embeddings is {tied!r}; expected true or false")


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes `rope_parameters` (theta inside), earlier versions `rope_scaling` (theta beside it).
    new, old = (_rope_dictionary(config, key) for key in ("rope_parameters", "rope_scaling"))
    if any(new.get(name, value) != value for name, value in old.items()):
        raise InputError(
            f"config.json: rope_parameters {config['rope_parameters']} and rope_scaling {config['rope_scaling']} "
            "differ; keep one of them"
        )
    rope = old | new
    theta, other = config.get("rope_theta"), rope.get("rope_theta")
    if theta and other and theta != other:
        raise InputError(
            f"config.json: rope_theta is {theta!r}, and {other!r} inside rope_parameters; keep one of them"
        )
    return rope


def _rope_dictionary(config: dict[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"config.json: {key} is {found!r}; expected an object such as {{'rope_type': 'default'}}")
    rope = {name: value for name, value in found.items() if value is not None}
    kind = rope.pop("type", None)  # the name that `rope_type` had before transformers 4.45
    return rope if kind is None else {"rope_type": kind} | rope


def _rope_scaling(parameters: dict[str, Any]) -> RopeScaling | None:
    kind = parameters.get("rope_type") or "default"
    if kind not in _ROPE_KEYS:
        raise InputError(f"config.json: rotary scaling of type {kind!r}; expected default, linear or llama3")
    needed = _ROPE_KEYS[kind]
    missing = [name for name in needed if name not in parameters]
    if missing:
        raise InputError(f"config.json: rotary scaling of type {kind!r} has no {missing[0]} (found: {parameters})")
    # What a linear scaling was stretched from is written down, and used by nobody.
    unknown = parameters.keys() - {*needed, "rope_type", "rope_theta", "original_max_position_embeddings"}
    if unknown:
        name = min(unknown)
        raise InputError(
            f"config.json: rotary scaling of type {kind!r} has {name} {parameters[name]!r}, which is not built here "
            f"(it has {', '.join(needed) or 'no parameters'})"
        )
    return None if kind == "default" else RopeScaling(kind=kind, **{name: parameters[name] for name in needed})


class LlamaLayer(nnx.Module):
    """One layer: attention and MLP, each behind its norm and added to the stream."""

    def __init__(self, config: LlamaConfig, compute: ComputeOptions, lora: Lora | None, *, rngs: nnx.Rngs):
        types = {"dtype": jnp.dtype(compute.dtype), "param_dtype": jnp.dtype(compute.param_dtype)}

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs, **types)

        self.attention_norm, self.mlp_norm = norm(), norm()
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        linear = Linears(lora, **types)
        self.attention = Attention(config.hidden_size, *heads, linear, rngs=rngs)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, linear, rngs=rngs)

    def __call__(self, x: Float[Array, "N D"], *attention_arguments) -> Float[Array, "N D"]:
        """Applies the layer to N = B * S tokens; the further arguments are those of `Attention`."""
        x = x + self.attention(self.attention_norm(x), *attention_arguments)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """A Llama model without its softmax: tokens in, last hidden states out.

    Layers are stacked, and scanned in training, so that compile time does not grow with depth; or they lie apart, for
    decoding, which reads every weight for a few tokens and must not copy it out of the stack first.
    """

    def __init__(
        self,
        config: LlamaConfig,
        compute: ComputeOptions = ComputeOptions(),
        lora: Lora | None = None,
        stacked: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.compute, self.stacked = config, compute, stacked
        types = {"dtype": jnp.dtype(compute.dtype), "param_dtype": jnp.dtype(compute.param_dtype)}
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs, **types)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        if stacked:
            self.layers = jax.vmap(lambda key: LlamaLayer(config, compute, lora, rngs=nnx.Rngs(key)))(keys)
        else:
            self.layers = nnx.List(LlamaLayer(config, compute, lora, rngs=nnx.Rngs(key)) for key in keys)
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs, **types)
        if not config.tie_word_embeddings:
            self.unembed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs, **types)

    def head(self) -> Head:
        """Returns what makes logits of hidden states, in the type of the activations."""
        table = self.embed if self.config.tie_word_embeddings else self.unembed
        return Head(table.embedding[...].astype(self.compute.dtype))

    def __call__(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], mask: Bool[Array, "B S S"] | RowMask
    ) -> Float[Array, "B S D"]:
        """Computes last hidden states.

        Args:
            tokens: Token ids. Shape [B, S].
            positions: Rotary positions, in tokens. Shape [B, S].
            mask: True where a query may see a key. Shape [B, S, S]. Or a `RowMask`.

        Returns:
            Hidden states after the last norm. Shape [B, S, D].
        """
        attend, frequencies = masked_attention(mask, self.compute.attention), self._frequencies()
        run_layer = _rematerialised(lambda layer, x: layer(x, positions, attend, frequencies), self.compute.remat)
        x, _ = jax.lax.scan(lambda x, layer: (run_layer(layer, x), None), self._embedded(tokens), self.layers)
        return rearrange(self.norm(x), "(b s) d -> b s d", b=tokens.shape[0])

    def prefill(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], mask: Bool[Array, "B S S"] | RowMask, slots: int
    ) -> tuple[Float[Array, "B S D"], LayerCaches]:
        """Computes last hidden states of prompts, and keeps every layer's keys and values.

        Args:
            tokens: Token ids. Shape [B, S].
            positions: Rotary positions, in tokens. Shape [B, S].
            mask: As for `__call__`.
            slots: Room for the tokens that will follow, M.

        Returns:
            Hidden states after the last norm, shape [B, S, D], and the caches of all layers, stacked like the layers.
        """
        attend, frequencies = masked_attention(mask, self.compute.attention), self._frequencies()

        def run(x, layer):
            kept = None

            def keeping(q, k, v):
                nonlocal kept
                kept = LayerCache.of_prompt(k, v, slots)
                return attend(q, k, v)

            x = layer(x, positions, keeping, frequencies)
            return x, kept

        x = self._embedded(tokens)
        if self.stacked:
            x, caches = jax.lax.scan(run, x, self.layers)
        else:
            caches = []
            for layer in self.layers:
                x, cache = run(x, layer)
                caches.append(cache)
            caches = tuple(caches)
        return rearrange(self.norm(x), "(b s) d -> b s d", b=tokens.shape[0]), caches

    def extend(
        self,
        tokens: Int[Array, "B K"],
        positions: Int[Array, "B K"],
        prompt_mask: Bool[Array, "B P"],
        path_mask: Bool[Array, "B K M"],
        caches: LayerCaches,
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B K D"], LayerCaches]:
        """Runs K tokens a prompt, each at the end of a path of its own, and writes them into the pool.

        Args:
            tokens: Token ids. Shape [B, K].
            positions: Rotary positions, in tokens. Shape [B, K].
            prompt_mask: True at the prompt's tokens. Shape [B, P].
            path_mask: True at the slots of the pool that hold a token's past, and at its own. Shape [B, K, M].
            caches: Of all layers, as `prefill` returned them.
            slot: The pool's slot of the first of the K tokens.

        Returns:
            Hidden states after the last norm, shape [B, K, D], and the caches with the new tokens in them.
        """
        frequencies, x = self._frequencies(), self._embedded(tokens)

        def run(x, layer, cache):
            written = None

            def attend(q, k, v):
                nonlocal written
                written = cache.write(k, v, slot)
                return written.attend(q, prompt_mask, path_mask, slot + tokens.shape[1])

            x = layer(x, positions, attend, frequencies)
            return x, written

        if self.stacked:

            def step(carry, layer_and_index):
                x, caches = carry
                layer, index = layer_and_index
                x, own = run(x, layer, caches.layer(index))
                # The buffers travel in the carry, so that XLA writes the new slots in place.
                return (x, caches.with_slots_of(own, index, slot, tokens.shape[1])), None

            indices = jnp.arange(self.config.num_hidden_layers)
            (x, caches), _ = jax.lax.scan(step, (x, caches), (self.layers, indices))
        else:
            written = []
            for layer, cache in zip(self.layers, caches, strict=True):
                x, own = run(x, layer, cache)
                written.append(own)
            caches = tuple(written)
        return rearrange(self.norm(x), "(b k) d -> b k d", b=tokens.shape[0]), caches

    def _embedded(self, tokens: Int[Array, "B S"]) -> Float[Array, "N D"]:
        # One row a token: XLA transposes activations of three dimensions before it multiplies them on a CPU.
        return rearrange(constrain_batch(self.embed(tokens)), "b s d -> (b s) d")

    def _frequencies(self) -> Float[Array, " F"]:
        return rope_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)


def _rematerialised(run_layer, remat: str):
    if remat == "full":
        return jax.checkpoint(run_layer)
    if remat == "attention":
        return jax.checkpoint(run_layer, policy=jax.checkpoint_policies.save_only_these_names(ATTENDED))
    if remat == "dots":
        return jax.checkpoint(run_layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return run_layer


def hf_tensors(config: LlamaConfig) -> dict[str, tuple[str, bool]]:
    """Says where each parameter lies in a Hugging Face file.

    Returns:
        Path of the parameter here -> (name of the tensor there, whether it is stored transposed). A name with "{layer}"
        stands for one tensor a layer; here they are stacked along the first axis.
    """
    layer = "model.layers.{layer}."
    tensors = {
        "embed/embedding": ("model.embed_tokens.weight", False),
        "norm/scale": ("model.norm.weight", False),
        "layers/attention_norm/scale": (layer + "input_layernorm.weight", False),
        "layers/mlp_norm/scale": (layer + "post_attention_layernorm.weight", False),
    }
    for part in ("q", "k", "v", "o"):
        tensors[f"layers/attention/{part}/kernel"] = (f"{layer}self_attn.{part}_proj.weight", True)
    for part in ("gate", "up", "down"):
        tensors[f"layers/mlp/{part}/kernel"] = (f"{layer}mlp.{part}_proj.weight", True)
    if not config.tie_word_embeddings:
        tensors["unembed/embedding"] = ("lm_head.weight", False)
    return tensors


def forward_flops(config: LlamaConfig, *, tokens: float, scored_tokens: float, context: float) -> float:
    """Model FLOPs of one forward pass: two for each weight that a token meets, and those of attention.

    Args:
        config: Shape of the model.
        tokens: Tokens that pass the layers.
        scored_tokens: Tokens whose logits are computed.
        context: Mean number of keys that a query sees.

    Returns:
        Floating-point operations, a multiply-add counted as two; a backward pass costs twice as many.
    """
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * heads + 2 * kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    per_token = config.num_hidden_layers * (2 * (attention + mlp) + 4 * context * heads)
    return tokens * per_token + scored_tokens * 2 * config.hidden_size * config.vocab_size
