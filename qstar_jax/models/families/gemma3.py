"""Gemma 3, or the decoder of a multimodal one: local layers have a window and their own rotary positions."""

from typing import Any

from qstar_jax.errors import InputError
from qstar_jax.models.config_keys import Keys
from qstar_jax.models.decoder_config import DecoderConfig, LayerKind
from qstar_jax.models.families.gemma import read_activation, read_common
from qstar_jax.models.families.gemma2 import tensors, write_common
from qstar_jax.models.family import FULL, SLIDING, Family, read_cap, read_layer_types, read_window, with_windows
from qstar_jax.models.rope import Rope
from qstar_jax.models.rope_keys import make_rope, merge_formats, rope_dictionary, scaling_keys, write_rope

# Multimodal folders omit from `text_config` whatever equals the defaults of transformers.
_SIZES = {"vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8}
_LAYERS = 26


def _ropes(keys: Keys) -> dict[str, Rope]:
    """Reads rotary positions by type of layer; the older keys scale those of full layers only."""
    new = keys.get("rope_parameters") or {}
    if not isinstance(new, dict) or not set(new) <= {SLIDING, FULL}:
        raise InputError(f"config.json: rope_parameters is {new!r}; expected an object with {SLIDING} and {FULL}")
    inner = {kind: rope_dictionary(Keys(new), kind) for kind in (SLIDING, FULL)}
    old_scaling = rope_dictionary(keys, "rope_scaling")
    inner[FULL] = merge_formats(old_scaling, inner[FULL], "rope_scaling", f"rope_parameters.{FULL}")
    thetas = {SLIDING: ("rope_local_base_freq", 10_000.0), FULL: ("rope_theta", 1_000_000.0)}
    ropes = {}
    for kind, (name, default) in thetas.items():
        theta = keys.number(name, inner[kind].get("rope_theta", default))
        if inner[kind].get("rope_theta", theta) != theta:
            raise InputError(f"config.json: {name} is {theta!r} and differs from rope_parameters; keep one of them")
        ropes[kind] = make_rope(keys, inner[kind], theta=theta)
    return ropes


def _layers(keys: Keys) -> tuple[LayerKind, ...]:
    pattern = keys.size("sliding_window_pattern", keys.size("_sliding_window_pattern", 6))
    sliding = read_layer_types(keys, lambda layer: (layer + 1) % pattern != 0, _LAYERS)
    ropes, window = _ropes(keys), read_window(keys, 4096)
    return with_windows([ropes[SLIDING if slides else FULL] for slides in sliding], sliding, window)


def _read(keys: Keys) -> DecoderConfig:
    keys.expect("attn_logit_softcapping", None)  # transformers has the key, but never caps the scores
    return DecoderConfig(
        **read_common(keys, context=131_072, kv_heads=4, sizes=_SIZES),
        layers=_layers(keys),
        norm_placement="sandwich",
        qk_norm="head",
        activation=read_activation(keys),
        attention_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=read_cap(keys, "final_logit_softcapping", None),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    ropes = {FULL if kind.window is None else SLIDING: kind.rope for kind in config.layers}
    new = {kind: write_rope(rope)["rope_parameters"] for kind, rope in ropes.items()}
    old = {}
    if FULL in ropes:
        old = {"rope_theta": ropes[FULL].theta, "rope_scaling": scaling_keys(ropes[FULL].scaling)}
    if SLIDING in ropes:
        old["rope_local_base_freq"] = ropes[SLIDING].theta
    return write_common(config) | old | {"rope_parameters": new}


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Extracts the decoder's part of a multimodal config.json; keys at both levels must agree."""
    keys = Keys(config)
    inner = keys.get("text_config")
    if not isinstance(inner, dict) or inner.get("model_type", "gemma3_text") != "gemma3_text":
        raise InputError(f"config.json: text_config is {inner!r}; expected the configuration of a gemma3_text model")
    for name in ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"):
        keys.get(name)
    tied = keys.flag("tie_word_embeddings", True)
    if inner.get("tie_word_embeddings", tied) is not tied:
        raise InputError("config.json: tie_word_embeddings differs from that in text_config; keep one of them")
    return keys.remaining() | {"tie_word_embeddings": tied} | inner | {"model_type": "gemma3_text"}


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _read,
    _write,
    tensors,
    unwrap={"gemma3": _text_config},
    ignored=r"(^|\.)rotary_emb(_local)?\.inv_freq$",
    outside=r"^(model\.)?(vision_tower|multi_modal_projector)\.",
    # Depending on its version, transformers stores the decoder as language_model.model.* or model.language_model.*
    renamed=(r"^(?:language_model\.(?=(?:model|lm_head)\.)|(model\.)language_model\.)", r"\1"),
)
