"""Gemma: norms that store their scale minus 1, embeddings scaled by the square root of their width, wide heads."""

from typing import Any

from qstar_jax.errors import InputError
from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.family import Family, read_shape, same_layers, standard_tensors, write_shape
from qstar_jax.models.rope_keys import read_rope, write_rope


def read_common(keys: Keys, **shape: Any) -> dict[str, Any]:
    """Reads the fields that Gemma 1, 2 and 3 share; the other arguments are passed to `read_shape`."""
    keys.expect("use_bidirectional_attention", False)
    fields = read_shape(keys, **{"head_dim": 256, "tied": True, **shape})
    bias = keys.flag("attention_bias", False)
    scale = fields["hidden_size"] ** 0.5
    return fields | {"norm": "rms_plus_one", "embedding_scale": scale, "qkv_bias": bias, "o_bias": bias}


def read_activation(keys: Keys, *, either: bool = False) -> str:
    """Reads the activation function; "gelu" in the first Gemma files means the tanh approximation.

    Args:
        keys: The config.json.
        either: Whether `hidden_act` is read if `hidden_activation` is not set; otherwise it may only repeat it.

    Raises:
        InputError: If the two keys differ.
    """
    present = [name for name in ("hidden_activation", "hidden_act") if keys.get(name) is not None]
    names = present if either and present else ["hidden_activation", *present]
    values = {"gelu_tanh" if keys.get(name) == "gelu" else keys.activation(name, "gelu_pytorch_tanh") for name in names}
    if len(values) > 1:
        raise InputError(
            f"config.json: hidden_activation {keys.get('hidden_activation')!r} and hidden_act "
            f"{keys.get('hidden_act')!r} differ; keep one of them"
        )
    return values.pop()


def _read(keys: Keys) -> DecoderConfig:
    return DecoderConfig(
        **read_common(keys, context=8192, kv_heads=16),
        layers=same_layers(keys, read_rope(keys, theta=10_000.0)),
        # transformers 4 reads hidden_activation unless it is null, transformers 5 only hidden_act.
        activation=read_activation(keys, either=True),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    names = dict.fromkeys(("hidden_activation", "hidden_act"), activation_name(config.activation))
    return write_shape(config) | write_rope(config.layers[0].rope) | names | {"attention_bias": config.o_bias}


FAMILY = Family("gemma", "GemmaForCausalLM", _read, _write, standard_tensors)
