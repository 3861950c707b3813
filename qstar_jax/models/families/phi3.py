"""Phi 3, 3.5 and 4: fused layers, longrope, and partially rotated heads in Phi 4 mini."""

from typing import Any

from qstar_jax.models.config_keys import Keys, activation_name
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.models.family import Family, read_shape, read_window, same_layers, standard_tensors, write_shape
from qstar_jax.models.rope import LongRope
from qstar_jax.models.rope_keys import read_rope, write_rope
from qstar_jax.models.tensors import Tensor, fused, linear

_FRACTION = ("partial_rotary_factor",)
_CONTEXT = 4096


def _read(keys: Keys) -> DecoderConfig:
    rope = read_rope(
        keys,
        theta=10_000.0,
        fraction_keys=_FRACTION,
        original=_CONTEXT,
        aliases={"su": "longrope", "yarn": "longrope"},  # names in the first files
    )
    keys.allow("original_max_position_embeddings")  # used by longrope only
    keys.allow_code("modeling_phi3.Phi3ForCausalLM")
    for name in ("full_attn_mod", "interpolate_factor"):  # Phi 4 mini
        keys.expect(name, 1)
    return DecoderConfig(
        **read_shape(keys, context=_CONTEXT, eps=1e-5),
        layers=same_layers(keys, rope, read_window(keys, None)),
        activation=keys.activation("hidden_act", "silu"),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    kind, scaling = config.layers[0], config.layers[0].rope.scaling
    keys = write_rope(kind.rope, fraction_keys=_FRACTION)
    if isinstance(scaling, LongRope):
        context = scaling.original_max_position_embeddings
        keys["original_max_position_embeddings"] = context
        if scaling.attention_factor is None and scaling.factor == config.max_position_embeddings / context:
            # transformers 4 accepts these three keys only; it must refuse any other factor.
            lists = {name: keys["rope_scaling"][name] for name in ("short_factor", "long_factor")}
            keys["rope_scaling"] = {"type": "longrope", **lists}
    keys |= {"hidden_act": activation_name(config.activation), "sliding_window": kind.window}
    return write_shape(config) | keys


def _tensors(config: DecoderConfig) -> dict[str, Tensor]:
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    layer, tensors = "model.layers.{layer}.", standard_tensors(config)
    for name, part in zip("qkv", fused(heads, kv_heads, kv_heads), strict=True):
        tensors |= linear(f"layers/attention/{name}", f"{layer}self_attn.qkv_proj", bias=False, part=part)
    for name, part in zip(("gate", "up"), fused(config.intermediate_size, config.intermediate_size), strict=True):
        tensors |= linear(f"layers/mlp/{name}", f"{layer}mlp.gate_up_proj", bias=False, part=part)
    return tensors


FAMILY = Family("phi3", "Phi3ForCausalLM", _read, _write, _tensors)
