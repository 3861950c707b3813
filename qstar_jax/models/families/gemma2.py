"""Gemma 2: norms before and after attention and MLP, a window in every other layer, caps on scores and logits."""

from typing import Any

from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.families.gemma import read_activation, read_common
from qstar_jax.models.family import (
    Family,
    read_cap,
    read_layer_types,
    read_window,
    standard_tensors,
    with_windows,
    write_shape,
    write_windows,
)
from qstar_jax.models.rope_keys import read_rope, write_rope
from qstar_jax.models.tensors import Tensor

# post_attention_layernorm is the norm after attention here, but the norm before the MLP in Llama.
_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def tensors(config: DecoderConfig) -> dict[str, Tensor]:
    """Returns the tensors of Gemma 2 and 3."""
    return standard_tensors(config, _NORMS)


def _read(keys: Keys) -> DecoderConfig:
    sliding, rope = read_layer_types(keys, lambda layer: layer % 2 == 0), read_rope(keys, theta=10_000.0)
    return DecoderConfig(
        **read_common(keys, context=8192, kv_heads=4),
        layers=with_windows([rope] * len(sliding), sliding, read_window(keys, 4096)),
        norm_placement="sandwich",
        activation=read_activation(keys),
        attention_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        score_softcap=read_cap(keys, "attn_logit_softcapping", 50.0),
        logit_softcap=read_cap(keys, "final_logit_softcapping", 30.0),
    )


def write_common(config: DecoderConfig) -> dict[str, Any]:
    """Returns the keys that Gemma 2 and 3 share."""
    return (
        write_shape(config)
        | write_windows(config)
        | {
            "hidden_activation": activation_name(config.activation),
            "attention_bias": config.o_bias,
            "query_pre_attn_scalar": _whole(config.scale**-2),
            "attn_logit_softcapping": config.score_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    )


def _whole(number: float) -> float | int:
    """Rounds a number that is whole up to rounding errors: transformers 5 accepts whole numbers only."""
    return round(number) if abs(number - round(number)) < 1e-6 else number


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_common(config) | write_rope(config.layers[0].rope)


FAMILY = Family("gemma2", "Gemma2ForCausalLM", _read, _write, tensors)
