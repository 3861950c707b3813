"""adapter_config.json of PEFT: every key is applied as PEFT applies it, known to be harmless, or refused by name."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qstar_jax.errors import InputError
from qstar_jax.store.hub.folder import read_json_object

CONFIG = "adapter_config.json"
MERGE = "merge it with PEFT, and open what that saves: model.merge_and_unload().save_pretrained(folder)"

_READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "use_dora", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights"),
    "bias",
}
_HARMLESS = {
    *("auto_mapping", "peft_version", "inference_mode", "runtime_config"),  # notes of who wrote it
    "lora_dropout",  # of training
    *("megatron_config", "megatron_core"),  # how linear layers of Megatron were cut; ours are not of Megatron
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of what init_lora_weights names
    "qalora_group_size",  # of use_qalora
    "fan_in_fan_out",  # PEFT sets it to what the layers are
}
_EMPTY = (None, False, "", [], {})
# Beginnings that leave the base as it is, so that the matrices that were saved are all there is.
_PLAIN_BEGINNINGS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
_BEGINNINGS_IN_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says of numbers; modules are named as in the base model of transformers.

    Attributes:
        path: Where it lies.
        base: Folder or hub name of the base.
        revision: Version of the base on the hub; None: its newest.
        rank: Rank where no pattern says another.
        alpha: Alpha where no pattern says another.
        rank_pattern: Regular expression over ends of names -> rank.
        alpha_pattern: The same for alphas.
        rank_stabilised: Scale by alpha / sqrt(rank), not by alpha / rank.
        dora: Whether the rows of adapted matrices have lengths of their own (DoRA, arXiv 2402.09353).
        targets: Ends of names; or a regular expression over whole names, or "all-linear".
        excluded: The same of modules that are no targets.
        layers: Layers that are adapted; none: all.
        layers_pattern: Names of the list in which layers are counted; none: any.
        saved: Ends of names of modules that were trained whole.
        tokens: End of an embedding's name -> tokens whose vectors were trained; "" is the input embedding.
        tied: Whether embedding and unembedding were kept the same, where the base ties them.
        bias: Which biases were trained: "none", those of "all" modules, or "lora_only", those of adapted ones.
    """

    path: Path
    base: str
    revision: str | None
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rank_stabilised: bool
    dora: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: dict[str, tuple[int, ...]]
    tied: bool
    bias: str

    def adapts(self, module: str, *, is_layer: bool) -> bool:
        """Whether a module has a pair of matrices.

        Args:
            module: Its name, such as "model.layers.0.self_attn.q_proj".
            is_layer: Whether it is a linear layer of a block.
        """
        if self._names(self.excluded, module) or any(_matches(rf"(^|.*\.){m}($|\..*)", module) for m in self.saved):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            return is_layer
        return self._names(self.targets, module) and self._in_layers(module)

    def _names(self, names: str | tuple[str, ...], module: str) -> bool:
        if isinstance(names, str):
            return bool(names) and bool(_matches(names, module, re.fullmatch))
        return any(f".{module}".endswith(f".{name}") for name in names)

    def _in_layers(self, module: str) -> bool:
        if not self.layers or module in self.targets:
            return True
        index = r"\.(?P<index>\d+)\."
        patterns = [rf"(?:^|.*?\.){name}{index}" for name in self.layers_pattern] or [rf".*?\.[^.]*{index}"]
        found = next((match for pattern in patterns if (match := _matches(pattern, module))), None)
        return found is not None and int(found["index"]) in self.layers

    def rank_of(self, module: str) -> int:
        """Rank of a module's matrices."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's matrices is multiplied by."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def saves(self, module: str) -> bool:
        """Whether a module was trained whole, itself or as a part of another."""
        parts = module.split(".")
        wholes = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return any(whole.endswith(name) for whole in wholes for name in self.saved)


def _matches(pattern: str, text: str, match=re.match) -> re.Match | None:
    try:
        return match(pattern, text)
    except re.error as error:
        raise InputError(f"{CONFIG}: {pattern!r} is not a regular expression ({error})") from error


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    return next((value for end, value in patterns.items() if _matches(rf"(.*\.)?({end})$", module)), default)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads adapter_config.json.

    Args:
        folder: A folder in PEFT's format.

    Returns:
        What it says.

    Raises:
        InputError: If a key is missing, has a value that is not one of its own, or changes numbers in a way that is not
            built here.
    """
    path = folder / CONFIG
    config = read_json_object(path)
    if config.get("peft_type", "LORA") != "LORA":
        raise InputError(f"{path}: peft_type is {config['peft_type']!r}; adapters are built with 'LORA' only; {MERGE}")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise InputError(f"{path}: no key {missing[0]!r} (found: {', '.join(sorted(config))})")
    _refuse_what_is_not_built(path, config)
    keys = _Keys(path, config)
    layers = config.get("layers_to_transform")
    found = AdapterConfig(
        path=path,
        base=keys.one("base_model_name_or_path", lambda x: isinstance(x, str) and x, "a folder or a hub name"),
        revision=keys.one("revision", lambda x: x is None or isinstance(x, str), "a name of a version or null"),
        rank=keys.one("r", _is_rank, "a whole number of at least 1"),
        alpha=keys.one("lora_alpha", _is_number, "a number"),
        rank_pattern=keys.mapping("rank_pattern", _is_rank, "whole numbers of at least 1"),
        alpha_pattern=keys.mapping("alpha_pattern", _is_number, "numbers"),
        rank_stabilised=keys.flag("use_rslora"),
        dora=keys.flag("use_dora"),
        targets=keys.names("target_modules"),
        excluded=keys.names("exclude_modules"),
        layers=keys.whole_numbers("layers_to_transform", [layers] if isinstance(layers, int) else layers),
        layers_pattern=_several(keys.names("layers_pattern")),
        saved=_several(keys.names("modules_to_save")),
        tokens=_tokens(keys, config.get("trainable_token_indices")),
        tied=keys.flag("ensure_weight_tying"),
        bias=config.get("bias", "none"),
    )
    if isinstance(found.targets, str) and (found.layers or found.layers_pattern):
        raise InputError(f"{path}: layers_to_transform goes with a list of target_modules (found: {found.targets!r})")
    if found.layers_pattern and not found.layers:
        raise InputError(f"{path}: layers_pattern {list(found.layers_pattern)} without layers_to_transform")
    return found


def _refuse_what_is_not_built(path: Path, config: dict[str, Any]):
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(
            f"{path}: task_type is {config['task_type']!r}; only adapters of causal language models ('CAUSAL_LM') are "
            "built here"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise InputError(f"{path}: bias is {config['bias']!r}; expected none, all or lora_only")
    beginning = str(config.get("init_lora_weights", True)).lower()
    if beginning.startswith(_BEGINNINGS_IN_THE_BASE):
        raise InputError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changed the weights of the base when "
            "training began, so the adapter does not belong to the base as it is; convert it with PEFT "
            f"(save_pretrained(folder, path_initial_model_for_weight_conversion=...)), or {MERGE}"
        )
    if beginning not in _PLAIN_BEGINNINGS:
        raise InputError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}; expected one of "
            f"{', '.join(_PLAIN_BEGINNINGS)}"
        )
    for key in sorted(config.keys() - _READ - _HARMLESS):
        if config[key] not in _EMPTY:
            raise InputError(
                f"{path}: {key} is {config[key]!r}, which is not built here and may change what the adapter computes; "
                f"{MERGE}"
            )


@dataclass(frozen=True)
class _Keys:
    path: Path
    config: dict[str, Any]

    def _refuse(self, key: str, expected: str):
        raise InputError(f"{self.path}: {key} is {self.config.get(key)!r}; expected {expected}")

    def one(self, key: str, is_right, expected: str) -> Any:
        value = self.config.get(key)
        return value if is_right(value) else self._refuse(key, expected)

    def flag(self, key: str) -> bool:
        return bool(self.one(key, lambda x: x is None or isinstance(x, bool), "true or false"))

    def names(self, key: str) -> str | tuple[str, ...]:
        value = self.config.get(key) or ()
        if isinstance(value, str):
            return value
        right = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
        return tuple(value) if right else self._refuse(key, "names of modules")

    def mapping(self, key: str, is_right, expected: str) -> dict[str, Any]:
        value = self.config.get(key) or {}
        right = isinstance(value, dict) and all(map(is_right, value.values()))
        return value if right else self._refuse(key, f"names of modules and {expected}")

    def whole_numbers(self, key: str, value: Any) -> tuple[int, ...]:
        right = value is None or (isinstance(value, list) and all(type(x) is int and x >= 0 for x in value))
        return tuple(value or ()) if right else self._refuse(key, "whole numbers")


def _tokens(keys: _Keys, value: Any) -> dict[str, tuple[int, ...]]:
    several = value if isinstance(value, dict) else {"": value}
    tokens = {name: keys.whole_numbers("trainable_token_indices", ids) for name, ids in several.items()}
    return {name: ids for name, ids in tokens.items() if ids}


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
