"""A model family reads and writes config.json and lists its tensors; this module has what families share."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qstar_jax.errors import InputError
from qstar_jax.models.config_keys import Keys
from qstar_jax.models.decoder_config import DecoderConfig, LayerKind
from qstar_jax.models.rope import Rope
from qstar_jax.models.tensors import Tensor, linear, norm

SLIDING, FULL = "sliding_attention", "full_attention"  # values of `layer_types`: with and without a window


@dataclass(frozen=True)
class Family:
    """How Hugging Face stores the models of a family.

    Attributes:
        model_type: Name of the family in config.json.
        architecture: Class name in transformers, for config.json.
        read: Maps config.json to a configuration.
        write: Maps a configuration to keys of config.json that `read` and transformers 4 and 5 can read.
        tensors: Maps a configuration to path of each parameter -> its layout in files.
        unwrap: model_type of a multimodal model -> function that extracts the decoder's config.json from the whole.
        ignored: Regular expression of tensor names that are derived from config.json.
        outside: Regular expression of tensor names outside of the decoder, in multimodal models.
        renamed: (regular expression, replacement) that turns other names of tensors into those of `tensors`.
    """

    model_type: str
    architecture: str
    read: Callable[[Keys], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    tensors: Callable[[DecoderConfig], dict[str, Tensor]]
    unwrap: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    ignored: str = r"(^|\.)rotary_emb\.inv_freq$"
    outside: str = "^$"
    renamed: tuple[str, str] = ("^$", "")

    def canonical(self, name: str) -> str | None:
        """Returns the name of a stored tensor in `tensors`; None if it is not read."""
        if re.search(self.ignored, name) or re.search(self.outside, name):
            return None
        return re.sub(*self.renamed, name)


def read_shape(
    keys: Keys,
    *,
    context: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    eps: float = 1e-6,
    tied: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Reads the keys that most families share.

    Args:
        keys: The config.json.
        context: Default of `max_position_embeddings`.
        kv_heads: Default of `num_key_value_heads`; if that is null, or this None, the number of heads.
        head_dim: Default of `head_dim`; None: hidden_size / heads.
        eps: Default of `rms_norm_eps`.
        tied: Default of `tie_word_embeddings`.
        sizes: Defaults of the other sizes; those without one are required.

    Returns:
        Fields of a `DecoderConfig`.

    Raises:
        InputError: If a size is missing or invalid, or sizes do not match.
    """
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    shape = {name: keys.size(name, (sizes or {}).get(name)) for name in names}
    heads = shape["num_attention_heads"]
    default = heads if keys.has("num_key_value_heads") or kv_heads is None else kv_heads
    groups = keys.size("num_key_value_heads", default)
    if heads % groups:
        raise InputError(f"config.json: {groups} num_key_value_heads do not divide {heads} num_attention_heads")
    if head_dim is None and keys.get("head_dim") is None:
        head_dim = head_width(keys, "num_attention_heads", "hidden_size")
    return shape | {
        "num_key_value_heads": groups,
        "head_dim": keys.size("head_dim", head_dim),
        "max_position_embeddings": keys.size("max_position_embeddings", context),
        "norm_eps": keys.number("rms_norm_eps", eps),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", tied),
    }


def head_width(keys: Keys, heads: str, width: str) -> int:
    """Computes the width of a head from the keys with these names.

    Raises:
        InputError: If the number of heads does not divide the width of the model.
    """
    if keys.size(width) % keys.size(heads):
        raise InputError(
            f"config.json: {keys.size(heads)} {heads} do not divide {width} {keys.size(width)}, and no other key sets "
            "the width of a head"
        )
    return keys.size(width) // keys.size(heads)


def write_shape(config: DecoderConfig) -> dict[str, Any]:
    """Returns the keys that `read_shape` reads, and the number of layers."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    return {name: getattr(config, name) for name in names} | {"rms_norm_eps": config.norm_eps}


def same_layers(keys: Keys, rope: Rope | None, window: int | None = None, key: str = "num_hidden_layers"):
    """Returns equal layers, their number given by `key`."""
    return (LayerKind(rope, window),) * keys.layers(key)


def read_layer_types(keys: Keys, otherwise: Callable[[int], bool], layers: int | None = None) -> list[bool]:
    """Reads which layers have a window, one entry per layer.

    Args:
        keys: The config.json.
        otherwise: Maps a layer, from 0, to whether it has a window; used without `layer_types`.
        layers: Default of `num_hidden_layers`; None: required.

    Raises:
        InputError: If `layer_types` has the wrong number of layers, or other types.
    """
    count = keys.layers(default=layers)
    types = keys.get("layer_types")
    if types is None:
        return [otherwise(layer) for layer in range(count)]
    if not isinstance(types, list) or len(types) != count or any(kind not in (SLIDING, FULL) for kind in types):
        raise InputError(
            f"config.json: layer_types is {types!r}; expected {count} (num_hidden_layers) times {SLIDING} or {FULL}"
        )
    return [kind == SLIDING for kind in types]


def read_window(keys: Keys, default: int | None) -> int | None:
    """Reads `sliding_window`: the default if the key is missing, no window if it is null."""
    if keys.has("sliding_window") and keys.get("sliding_window") is None:
        return None
    return keys.size("sliding_window", default) if default or keys.has("sliding_window") else None


def read_cap(keys: Keys, name: str, default: float | None) -> float | None:
    """Reads a cap: the default if the key is missing, no cap if it is null."""
    if default is None or keys.has(name):
        return None if keys.get(name) is None else keys.number(name)
    return default


def with_windows(ropes: Sequence[Rope | None], sliding: Sequence[bool], window: int | None) -> tuple[LayerKind, ...]:
    """Returns layers of which some have a window.

    Raises:
        InputError: If a layer needs the window and there is none.
    """
    if any(sliding) and window is None:
        raise InputError(f"config.json: layer_types has {SLIDING}, but sliding_window is unset")
    return tuple(LayerKind(rope, window if slides else None) for rope, slides in zip(ropes, sliding, strict=True))


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """Returns `layer_types` and `sliding_window`."""
    windows = [kind.window for kind in config.layers]
    types = [FULL if window is None else SLIDING for window in windows]
    return {"layer_types": types, "sliding_window": next(filter(None, windows), None)}


def standard_tensors(config: DecoderConfig, norms: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a model that uses Llama's names; `norms` maps our names of norms to stored ones."""
    layer = "model.layers.{layer}."
    norms = norms or {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.qk_norm is not None:
        norms = {**norms, "attention/q_norm": "self_attn.q_norm", "attention/k_norm": "self_attn.k_norm"}
    tensors = {"embed/embedding": Tensor("model.embed_tokens.weight"), **norm("norm", "model.norm")}
    for path, name in norms.items():
        tensors |= norm(f"layers/{path}", layer + name)
    for part in ("q", "k", "v", "o"):
        bias = config.o_bias if part == "o" else config.qkv_bias
        tensors |= linear(f"layers/attention/{part}", f"{layer}self_attn.{part}_proj", bias)
    for part in ("gate", "up", "down"):
        tensors |= linear(f"layers/mlp/{part}", f"{layer}mlp.{part}_proj", config.mlp_bias)
    if not config.tie_word_embeddings:
        tensors["unembed/embedding"] = Tensor("lm_head.weight")
    return tensors
