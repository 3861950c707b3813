"""Qwen 2 and 2.5: biases on queries, keys and values, and optionally a window from some layer on."""

from typing import Any

from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig, LayerKind
from qstar_jax.models.family import (
    Family,
    read_layer_types,
    read_shape,
    read_window,
    standard_tensors,
    with_windows,
    write_shape,
    write_windows,
)
from qstar_jax.models.rope_keys import read_rope, write_rope


def read_layers(keys: Keys) -> tuple[LayerKind, ...]:
    """Reads the layers of Qwen 2 and 3."""
    window, first = read_window(keys, 4096), keys.size("max_window_layers", 28, least=0)
    if not keys.flag("use_sliding_window", False):
        window = None
    sliding = read_layer_types(keys, lambda layer: window is not None and layer >= first)
    return with_windows([read_rope(keys, theta=10_000.0)] * len(sliding), sliding, window)


def write_layers(config: DecoderConfig) -> dict[str, Any]:
    """Returns the keys that `read_layers` reads."""
    sliding = [kind.window is not None for kind in config.layers]
    full = next((layer for layer, slides in enumerate(sliding) if slides), len(sliding))
    windows = {"use_sliding_window": any(sliding), "max_window_layers": full}
    return write_rope(config.layers[0].rope) | write_windows(config) | windows


def _read(keys: Keys) -> DecoderConfig:
    return DecoderConfig(
        **read_shape(keys, context=32_768),
        layers=read_layers(keys),
        activation=keys.activation("hidden_act", "silu"),
        qkv_bias=True,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_shape(config) | write_layers(config) | {"hidden_act": activation_name(config.activation)}


FAMILY = Family("qwen2", "Qwen2ForCausalLM", _read, _write, standard_tensors)
