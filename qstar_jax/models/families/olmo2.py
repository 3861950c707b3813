"""OLMo 2: norms after attention and MLP instead of before, and norms over all queries and over all keys."""

from typing import Any

from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.family import Family, read_shape, same_layers, standard_tensors, write_shape
from qstar_jax.models.rope_keys import read_rope, write_rope
from qstar_jax.models.tensors import Tensor

_NORMS = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}


def _read(keys: Keys) -> DecoderConfig:
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **read_shape(keys, context=2048, eps=1e-5),
        layers=same_layers(keys, read_rope(keys, theta=10_000.0)),
        norm_placement="post",
        qk_norm="all",
        activation=keys.activation("hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    keys = {"hidden_act": activation_name(config.activation), "attention_bias": config.o_bias}
    return write_shape(config) | write_rope(config.layers[0].rope) | keys


def _tensors(config: DecoderConfig) -> dict[str, Tensor]:
    return standard_tensors(config, _NORMS)


FAMILY = Family("olmo2", "Olmo2ForCausalLM", _read, _write, _tensors)
