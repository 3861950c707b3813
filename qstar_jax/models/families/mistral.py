"""Mistral 7B (with a window in its first version), Nemo and Small."""

from typing import Any

from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.family import Family, read_shape, read_window, same_layers, standard_tensors, write_shape
from qstar_jax.models.rope_keys import read_rope, write_rope


def _read(keys: Keys) -> DecoderConfig:
    return DecoderConfig(
        **read_shape(keys, context=131_072, kv_heads=8),
        layers=same_layers(keys, read_rope(keys, theta=10_000.0), read_window(keys, 4096)),
        activation=keys.activation("hidden_act", "silu"),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    kind = config.layers[0]
    keys = {"hidden_act": activation_name(config.activation), "sliding_window": kind.window}
    return write_shape(config) | write_rope(kind.rope) | keys


FAMILY = Family("mistral", "MistralForCausalLM", _read, _write, standard_tensors)
