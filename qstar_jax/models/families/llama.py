"""Llama 2, 3, 3.1 and 3.2, SmolLM and SmolLM2, TinyLlama, the dense DeepSeek distillations, and many more."""

from typing import Any

from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.family import Family, read_shape, same_layers, standard_tensors, write_shape
from qstar_jax.models.rope_keys import read_rope, write_rope


def _read(keys: Keys) -> DecoderConfig:
    keys.expect("rope_interleaved", False)  # SmolLM2
    keys.expect("activation", "swiglu")  # Falcon 3; only hidden_act is read
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **read_shape(keys, context=2048),
        layers=same_layers(keys, read_rope(keys, theta=10_000.0)),
        activation=keys.activation("hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    keys = {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}
    keys |= {"hidden_act": activation_name(config.activation)}
    return write_shape(config) | write_rope(config.layers[0].rope) | keys


FAMILY = Family("llama", "LlamaForCausalLM", _read, _write, standard_tensors)
