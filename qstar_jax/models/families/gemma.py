"""Gemma: norms stored less 1, embeddings scaled by the root of their width, wide heads."""

from typing import Any

from qstar_jax.errors import InputError
from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.family import Family, read_shape, same_layers, standard_tensors, write_shape
from qstar_jax.models.rope_keys import read_rope, write_rope


def read_common(keys: Keys, **shape: Any) -> dict[str, Any]:
    """Fields that Gemma 1, 2 and 3 share; further arguments are those of `read_shape`."""
    keys.only("use_bidirectional_attention", False)
    found = read_shape(keys, **{"head_dim": 256, "tied": True, **shape})
    bias = keys.flag("attention_bias", False)
    scale = found["hidden_size"] ** 0.5
    return found | {"norm": "rms_plus_one", "embedding_scale": scale, "qkv_bias": bias, "o_bias": bias}


def read_activation(keys: Keys, *, either: bool = False) -> str:
    """Reads the activation function; what Gemma's first files call gelu is its approximation by tanh.

    Args:
        keys: The config.json.
        either: Whether `hidden_act` counts where there is no `hidden_activation`; if not, it may only repeat it.

    Raises:
        InputError: If the two keys differ.
    """
    given = [name for name in ("hidden_activation", "hidden_act") if keys.get(name) is not None]
    names = given if either and given else ["hidden_activation", *given]
    found = {"gelu_tanh" if keys.get(name) == "gelu" else keys.activation(name, "gelu_pytorch_tanh") for name in names}
    if len(found) > 1:
        raise InputError(
            f"config.json: hidden_activation {keys.get('hidden_activation')!r} and hidden_act "
            f"{keys.get('hidden_act')!r} differ; keep one of them"
        )
    return found.pop()


def _read(keys: Keys) -> DecoderConfig:
    return DecoderConfig(
        **read_common(keys, context=8192, kv_heads=16),
        layers=same_layers(keys, read_rope(keys, theta=10_000.0)),
        # transformers 4 reads hidden_activation, where it is not null, and transformers 5 hidden_act alone.
        activation=read_activation(keys, either=True),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    names = dict.fromkeys(("hidden_activation", "hidden_act"), activation_name(config.activation))
    return write_shape(config) | write_rope(config.layers[0].rope) | names | {"attention_bias": config.o_bias}


FAMILY = Family("gemma", "GemmaForCausalLM", _read, _write, standard_tensors)
