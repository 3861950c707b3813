"""What a family is: a way to read a config.json, the way back, and a table of tensors; and what families share."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qstar_jax.errors import InputError
from qstar_jax.models.config_keys import Keys
from qstar_jax.models.decoder_config import DecoderConfig, LayerKind
from qstar_jax.models.rope import Rope
from qstar_jax.models.tensors import Tensor, linear, norm

SLIDING, FULL = "sliding_attention", "full_attention"  # as `layer_types` calls layers with and without a window


@dataclass(frozen=True)
class Family:
    """How Hugging Face stores the models of a family.

    Attributes:
        model_type: As config.json names it.
        architecture: The class of transformers, for config.json.
        read: Config.json -> configuration.
        write: Configuration -> keys of a config.json that `read` and transformers 4 and 5 read.
        tensors: Configuration -> path of each parameter here -> where it lies in a file.
        unwrap: Config.json of a model that holds one of the family within it -> that of the inner one; by the
            model_type of the outer one.
        ignored: Regular expression of names of tensors that are computed from config.json.
        outside: Regular expression of names of tensors that are no part of the decoder, in the model that holds it.
        renamed: Regular expression of other names that tensors have, and what stands in their place.
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
        """Returns the name by which `tensors` knows a tensor of a file; None for one that it does not read."""
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
    """Reads the keys that most families name alike.

    Args:
        keys: The config.json.
        context: `max_position_embeddings` where it is missing.
        kv_heads: `num_key_value_heads` where it is missing; where it is null, and by default, as many as heads.
        head_dim: Width of a head where none is given; None: hidden_size / heads.
        eps: `rms_norm_eps` where it is missing.
        tied: `tie_word_embeddings` where it is missing.
        sizes: Other sizes where they are missing; by default they must be there.

    Returns:
        Fields of a `DecoderConfig`.

    Raises:
        InputError: If a size is missing or no size, or sizes do not fit each other.
    """
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    shape = {name: keys.size(name, (sizes or {}).get(name)) for name in names}
    heads = shape["num_attention_heads"]
    default = heads if keys.says("num_key_value_heads") or kv_heads is None else kv_heads
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
    """Width of a head where the keys of these names alone say it.

    Raises:
        InputError: If heads do not divide the model's width.
    """
    if keys.size(width) % keys.size(heads):
        raise InputError(
            f"config.json: {keys.size(heads)} {heads} do not divide {width} {keys.size(width)}, and nothing else says "
            "how wide a head is"
        )
    return keys.size(width) // keys.size(heads)


def write_shape(config: DecoderConfig) -> dict[str, Any]:
    """Returns the keys that `read_shape` reads, and the number of layers."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    return {name: getattr(config, name) for name in names} | {"rms_norm_eps": config.norm_eps}


def same_layers(keys: Keys, rope: Rope | None, window: int | None = None, key: str = "num_hidden_layers"):
    """As many layers as a key says, all of one kind."""
    return (LayerKind(rope, window),) * keys.size(key)


def read_layer_types(keys: Keys, otherwise: Callable[[int], bool], layers: int | None = None) -> list[bool]:
    """Reads which layers have a window.

    Args:
        keys: The config.json.
        otherwise: Says so of a layer (from 0) where `layer_types` does not.
        layers: `num_hidden_layers` where it is missing; by default it must be there.

    Returns:
        One entry a layer.

    Raises:
        InputError: If `layer_types` speaks of another number of layers, or of other types.
    """
    count = keys.size("num_hidden_layers", layers)
    types = keys.get("layer_types")
    if types is None:
        return [otherwise(layer) for layer in range(count)]
    if not isinstance(types, list) or len(types) != count or any(kind not in (SLIDING, FULL) for kind in types):
        raise InputError(
            f"config.json: layer_types is {types!r}; expected {count} (num_hidden_layers) times {SLIDING} or {FULL}"
        )
    return [kind == SLIDING for kind in types]


def read_window(keys: Keys, default: int | None) -> int | None:
    """Reads `sliding_window`: the default where the key is missing, no window where it is null."""
    if keys.says("sliding_window") and keys.get("sliding_window") is None:
        return None
    return keys.size("sliding_window", default) if default or keys.says("sliding_window") else None


def read_cap(keys: Keys, name: str, default: float | None) -> float | None:
    """Reads a cap: the default where the key is missing, none where it is null."""
    if default is None or keys.says(name):
        return None if keys.get(name) is None else keys.number(name)
    return default


def with_windows(ropes: Sequence[Rope | None], sliding: Sequence[bool], window: int | None) -> tuple[LayerKind, ...]:
    """Layers some of which have a window.

    Args:
        ropes: Rotary positions of each.
        sliding: Which have the window.
        window: The window.

    Raises:
        InputError: If there are such layers and no window.
    """
    if any(sliding) and window is None:
        raise InputError(f"config.json: layer_types has {SLIDING}, and sliding_window says that there is no window")
    return tuple(LayerKind(rope, window if slides else None) for rope, slides in zip(ropes, sliding, strict=True))


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """Returns `layer_types` and `sliding_window`."""
    windows = [kind.window for kind in config.layers]
    types = [FULL if window is None else SLIDING for window in windows]
    return {"layer_types": types, "sliding_window": next(filter(None, windows), None)}


def standard_tensors(config: DecoderConfig, norms: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors of a model that names them as Llama does.

    Args:
        config: The model's shape.
        norms: Our name of each norm of a layer -> the file's; by default those before attention and before the MLP.
    """
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
