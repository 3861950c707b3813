"""Qwen 3 without experts: Qwen 2 with norms on queries and keys instead of biases."""

from typing import Any

from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.families.qwen2 import read_layers, write_layers
from qstar_jax.models.family import Family, read_shape, standard_tensors, write_shape


def _read(keys: Keys) -> DecoderConfig:
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **read_shape(keys, context=32_768, head_dim=128),
        layers=read_layers(keys),
        activation=keys.activation("hidden_act", "silu"),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    keys = {"hidden_act": activation_name(config.activation), "attention_bias": config.o_bias}
    return write_shape(config) | write_layers(config) | keys


FAMILY = Family("qwen3", "Qwen3ForCausalLM", _read, _write, standard_tensors)
