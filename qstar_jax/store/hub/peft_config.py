"""The adapter_config.json of PEFT: every key is applied as in PEFT, listed as harmless, or refused by name."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from qstar_jax.data.patterns import Pattern
from qstar_jax.errors import InputError
from qstar_jax.store.hub.folder import read_json_object

CONFIG = "adapter_config.json"
MERGE = "merge it with PEFT, and open the merged model: model.merge_and_unload().save_pretrained(folder)"

_READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "use_dora", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights"),
    "bias",
}
_HARMLESS = {
    *("auto_mapping", "peft_version", "inference_mode", "runtime_config"),  # notes of the writer
    "lora_dropout",  # only for training
    *("megatron_config", "megatron_core"),  # sharding of Megatron's linear layers
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # options of init_lora_weights
    "qalora_group_size",  # option of use_qalora
    "fan_in_fan_out",  # set by PEFT to match the layers
}
_EMPTY = (None, False, "", [], {})
# Initializations that leave the base unchanged, and those that change it.
_PLAIN_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
_INITS_IN_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter_config.json that determine numbers, with module names as in transformers.

    Attributes:
        path: Path of the file.
        base: Folder or name on the Hub of the base.
        revision: Version of the base on the Hub; None: the newest.
        rank: Default rank.
        alpha: Default alpha.
        rank_pattern: Regular expression over suffixes of names -> rank.
        alpha_pattern: The same for alphas.
        rank_stabilised: Scale by alpha / sqrt(rank) instead of alpha / rank.
        dora: Whether adapted matrices have trained row norms (DoRA, arXiv 2402.09353).
        targets: Suffixes of names, a regular expression over whole names, or "all-linear".
        excluded: The same for modules that are not targets.
        layers: Adapted layers; empty: all.
        layers_pattern: Names of the list that indexes layers; empty: any.
        saved: Suffixes of the names of fully trained modules.
        tokens: Suffix of an embedding's name -> tokens whose vectors were trained; "" is the input embedding.
        tied: Whether training kept the embeddings equal, if the base ties them.
        bias: Which biases were trained: "none", those of "all" modules, or only those of adapted ones ("lora_only").
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
        """Whether a module ("model.layers.0.self_attn.q_proj", say) has a pair of low-rank matrices."""
        if self._selects(self.excluded, module) or any(_matches(rf"(^|.*\.){m}($|\..*)", module) for m in self.saved):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            return is_layer
        return self._selects(self.targets, module) and self._in_layers(module)

    def _selects(self, names: str | tuple[str, ...], module: str) -> bool:
        if isinstance(names, str):
            return bool(names) and bool(_matches(names, module, whole=True))
        return any(f".{module}".endswith(f".{name}") for name in names)

    def _in_layers(self, module: str) -> bool:
        if not self.layers or module in self.targets:
            return True
        index = r"\.(?P<index>\d+)\."
        patterns = [rf"(?:^|.*?\.){name}{index}" for name in self.layers_pattern] or [rf".*?\.[^.]*{index}"]
        first = next((match for pattern in patterns if (match := _matches(pattern, module))), None)
        return first is not None and int(first["index"]) in self.layers

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's matrices."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the scale of the product of a module's matrices."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def saves(self, module: str) -> bool:
        """Whether a module, or one that contains it, was fully trained."""
        parts = module.split(".")
        ancestors = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return any(ancestor.endswith(name) for ancestor in ancestors for name in self.saved)


def _matches(pattern: str, text: str, *, whole: bool = False) -> regex.Match[str] | None:
    return Pattern.compile(pattern, f"{CONFIG}: {pattern!r}").match(text, whole=whole)


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    return next((value for suffix, value in patterns.items() if _matches(rf"(.*\.)?({suffix})$", module)), default)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads adapter_config.json.

    Raises:
        InputError: If a key is missing or invalid, or changes numbers in an unsupported way.
    """
    # Refuse what is not supported before reading the rest.
    path = folder / CONFIG
    config = read_json_object(path)
    if config.get("peft_type", "LORA") != "LORA":
        raise InputError(f"{path}: peft_type is {config['peft_type']!r}; only 'LORA' is supported; {MERGE}")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise InputError(f"{path}: no key {missing[0]!r} (found: {', '.join(sorted(config))})")
    _refuse_unsupported(path, config)

    keys = _Keys(path, config)
    layers = config.get("layers_to_transform")
    adapter = AdapterConfig(
        path=path,
        base=keys.one("base_model_name_or_path", lambda x: isinstance(x, str) and x, "a folder or a name on the Hub"),
        revision=keys.one("revision", lambda x: x is None or isinstance(x, str), "the name of a version or null"),
        rank=keys.one("r", _is_rank, "a whole number of at least 1"),
        alpha=keys.one("lora_alpha", _is_number, "a number"),
        rank_pattern=keys.mapping("rank_pattern", _is_rank, "whole numbers of at least 1"),
        alpha_pattern=keys.mapping("alpha_pattern", _is_number, "numbers"),
        rank_stabilised=keys.flag("use_rslora"),
        dora=keys.flag("use_dora"),
        targets=keys.names("target_modules"),
        excluded=keys.names("exclude_modules"),
        layers=keys.whole_numbers("layers_to_transform", [layers] if isinstance(layers, int) else layers),
        layers_pattern=_as_tuple(keys.names("layers_pattern")),
        saved=_as_tuple(keys.names("modules_to_save")),
        tokens=_tokens(keys, config.get("trainable_token_indices")),
        tied=keys.flag("ensure_weight_tying"),
        bias=config.get("bias", "none"),
    )
    if isinstance(adapter.targets, str) and (adapter.layers or adapter.layers_pattern):
        raise InputError(f"{path}: layers_to_transform requires a list of target_modules (found: {adapter.targets!r})")
    if adapter.layers_pattern and not adapter.layers:
        raise InputError(f"{path}: layers_pattern {list(adapter.layers_pattern)} without layers_to_transform")
    return adapter


def _refuse_unsupported(path: Path, config: dict[str, Any]):
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(
            f"{path}: task_type is {config['task_type']!r}; only adapters of causal language models ('CAUSAL_LM') are "
            "supported"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise InputError(f"{path}: bias is {config['bias']!r}; expected none, all or lora_only")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_INITS_IN_THE_BASE):
        raise InputError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changed the weights of the base when "
            "training began, so the adapter does not fit the original base; convert it with PEFT "
            f"(save_pretrained(folder, path_initial_model_for_weight_conversion=...)), or {MERGE}"
        )
    if init not in _PLAIN_INITS:
        raise InputError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}; expected one of {', '.join(_PLAIN_INITS)}"
        )
    for key in sorted(config.keys() - _READ - _HARMLESS):
        if config[key] not in _EMPTY:
            raise InputError(
                f"{path}: {key} is {config[key]!r}, which is not supported and may change what the adapter computes; "
                f"{MERGE}"
            )


@dataclass(frozen=True)
class _Keys:
    path: Path
    config: dict[str, Any]

    def _refuse(self, key: str, expected: str):
        raise InputError(f"{self.path}: {key} is {self.config.get(key)!r}; expected {expected}")

    def one(self, key: str, is_valid, expected: str) -> Any:
        value = self.config.get(key)
        return value if is_valid(value) else self._refuse(key, expected)

    def flag(self, key: str) -> bool:
        return bool(self.one(key, lambda x: x is None or isinstance(x, bool), "true or false"))

    def names(self, key: str) -> str | tuple[str, ...]:
        value = self.config.get(key) or ()
        if isinstance(value, str):
            return value
        valid = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
        return tuple(value) if valid else self._refuse(key, "names of modules")

    def mapping(self, key: str, is_valid, expected: str) -> dict[str, Any]:
        value = self.config.get(key) or {}
        valid = isinstance(value, dict) and all(map(is_valid, value.values()))
        return value if valid else self._refuse(key, f"names of modules and {expected}")

    def whole_numbers(self, key: str, value: Any) -> tuple[int, ...]:
        valid = value is None or (isinstance(value, list) and all(type(x) is int and x >= 0 for x in value))
        return tuple(value or ()) if valid else self._refuse(key, "whole numbers")


def _tokens(keys: _Keys, value: Any) -> dict[str, tuple[int, ...]]:
    by_table = value if isinstance(value, dict) else {"": value}
    tokens = {name: keys.whole_numbers("trainable_token_indices", ids) for name, ids in by_table.items()}
    return {name: ids for name, ids in tokens.items() if ids}


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
