"""GPT-2 and DistilGPT-2: learned positions, and layers stored as [inputs, outputs]."""

from functools import partial
from typing import Any

from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.family import Family, head_width, same_layers
from qstar_jax.models.tensors import Tensor, fused, linear, norm


def _read(keys: Keys) -> DecoderConfig:
    keys.expect("scale_attn_weights", True)
    keys.expect("scale_attn_by_inverse_layer_idx", False)
    keys.expect("reorder_and_upcast_attn", False)
    keys.expect("add_cross_attention", False)
    heads, width = keys.size("n_head"), keys.size("n_embd")
    return DecoderConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=width,
        intermediate_size=keys.size("n_inner", 4 * width),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_width(keys, "n_head", "n_embd"),
        layers=same_layers(keys, None, key="n_layer"),
        max_position_embeddings=keys.size("n_positions", 1024),
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=keys.activation("activation_function", "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        learned_positions=True,
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "activation_function": activation_name(config.activation, gelu_tanh="gelu_new"),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _tensors(config: DecoderConfig) -> dict[str, Tensor]:
    layer, stored = "transformer.h.{layer}.", partial(linear, bias=True, transposed=False)
    tensors = {
        "embed/embedding": Tensor("transformer.wte.weight"),
        "embed_positions/embedding": Tensor("transformer.wpe.weight"),
    }
    tensors |= norm("norm", "transformer.ln_f", bias=True)
    tensors |= norm("layers/attention_norm", layer + "ln_1", bias=True)
    tensors |= norm("layers/mlp_norm", layer + "ln_2", bias=True)
    for name, part in zip("qkv", fused(*[config.hidden_size] * 3), strict=True):
        tensors |= stored(f"layers/attention/{name}", layer + "attn.c_attn", part=part)
    tensors |= stored("layers/attention/o", layer + "attn.c_proj")
    tensors |= stored("layers/mlp/up", layer + "mlp.c_fc")
    tensors |= stored("layers/mlp/down", layer + "mlp.c_proj")
    if not config.tie_word_embeddings:
        tensors["unembed/embedding"] = Tensor("lm_head.weight")
    return tensors


FAMILY = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _read,
    _write,
    _tensors,
    ignored=r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$",  # masks in older files
    renamed=(r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),  # files on the Hub have no prefix
)
