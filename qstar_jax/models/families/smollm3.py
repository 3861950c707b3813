"""SmolLM 3: Llama without rotary positions in every fourth layer (arXiv 2501.18795)."""

from typing import Any

from qstar_jax.errors import InputError
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


def _layers(keys: Keys) -> tuple[LayerKind, ...]:
    count, rotary = keys.layers(), keys.get("no_rope_layers")
    keys.allow("no_rope_layer_interval")  # a default of no_rope_layers
    if rotary is None:
        interval = keys.size("no_rope_layer_interval", 4)
        rotary = [int((layer + 1) % interval != 0) for layer in range(count)]
    if not isinstance(rotary, list) or len(rotary) < count or any(one not in (0, 1) for one in rotary):
        raise InputError(
            f"config.json: no_rope_layers is {rotary!r}; expected a list with 1 (rotary positions) or 0 (none) for "
            f"each of {count} layers"
        )
    window = read_window(keys, None)
    if not keys.flag("use_sliding_window", False):
        window = None
    sliding = read_layer_types(keys, lambda layer: window is not None and not rotary[layer])
    rope = read_rope(keys, theta=2_000_000.0)
    return with_windows([rope if has else None for has in rotary[:count]], sliding, window)


def _read(keys: Keys) -> DecoderConfig:
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **read_shape(keys, context=32_768, kv_heads=4, tied=True),
        layers=_layers(keys),
        activation=keys.activation("hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    rope = next(filter(None, config.ropes), None)
    if rope is None:
        raise InputError("a smollm3 model must have rotary positions in at least one layer")
    return (
        write_shape(config)
        | write_rope(rope)
        | write_windows(config)
        | {
            "no_rope_layers": [int(kind.rope is not None) for kind in config.layers],
            "use_sliding_window": any(kind.window for kind in config.layers),
            "hidden_act": activation_name(config.activation),
            "attention_bias": config.o_bias,
            "mlp_bias": config.mlp_bias,
        }
    )


FAMILY = Family("smollm3", "SmolLM3ForCausalLM", _read, _write, standard_tensors)
