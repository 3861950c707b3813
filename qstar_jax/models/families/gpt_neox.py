"""GPT-NeoX and Pythia (the paper's model): parallel residuals, LayerNorm, a quarter of each head rotated."""

from typing import Any

from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.family import Family, head_width, same_layers
from qstar_jax.models.rope_keys import read_rope, write_rope
from qstar_jax.models.tensors import Part, Tensor, linear, norm

_ROPE = {
    "theta_keys": ("rotary_emb_base", "rope_theta"),
    "fraction_keys": ("rotary_pct", "partial_rotary_factor"),
}


def _read(keys: Keys) -> DecoderConfig:
    heads, width = keys.size("num_attention_heads"), keys.size("hidden_size")
    bias = keys.flag("attention_bias", True)
    return DecoderConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=width,
        intermediate_size=keys.size("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_width(keys, "num_attention_heads", "hidden_size"),
        layers=same_layers(keys, read_rope(keys, theta=10_000.0, fraction=0.25, **_ROPE)),
        max_position_embeddings=keys.size("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        parallel_residual=keys.flag("use_parallel_residual", True),
        activation=keys.activation("hidden_act", "gelu"),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("max_position_embeddings", "tie_word_embeddings")
    return (
        {name: getattr(config, name) for name in names}
        | write_rope(config.layers[0].rope, **_ROPE)
        | {
            "layer_norm_eps": config.norm_eps,
            "use_parallel_residual": config.parallel_residual,
            "hidden_act": activation_name(config.activation, gelu_tanh="gelu_new"),
            "attention_bias": config.o_bias,
        }
    )


def _tensors(config: DecoderConfig) -> dict[str, Tensor]:
    layer, width = "gpt_neox.layers.{layer}.", config.head_dim
    tensors = {"embed/embedding": Tensor("gpt_neox.embed_in.weight")}
    tensors |= norm("norm", "gpt_neox.final_layer_norm", bias=True)
    tensors |= norm("layers/attention_norm", layer + "input_layernorm", bias=True)
    tensors |= norm("layers/mlp_norm", layer + "post_attention_layernorm", bias=True)
    for number, part in enumerate("qkv"):  # query, key and value of a head are adjacent
        place = Part(number * width, (number + 1) * width, 3 * width, groups=config.num_attention_heads)
        name = layer + "attention.query_key_value"
        tensors |= linear(f"layers/attention/{part}", name, config.qkv_bias, part=place)
    tensors |= linear("layers/attention/o", layer + "attention.dense", config.o_bias)
    tensors |= linear("layers/mlp/up", layer + "mlp.dense_h_to_4h", config.mlp_bias)
    tensors |= linear("layers/mlp/down", layer + "mlp.dense_4h_to_h", config.mlp_bias)
    if not config.tie_word_embeddings:
        tensors["unembed/embedding"] = Tensor("embed_out.weight")
    return tensors


FAMILY = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _read,
    _write,
    _tensors,
    ignored=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",  # masks in older files
    renamed=(r"^lm_head\.", "embed_out."),
)
