"""Malformed adapters of PEFT: adapter_config.json and its tensors."""

import json
from functools import partial
from random import Random

import numpy as np
from case import Case, Place, write_safetensors, write_tensors

_RANK, _WIDTH = 2, 16
_LAYERS = "base_model.model.model.layers"
_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": _RANK,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
}


def _tensors() -> dict[str, np.ndarray]:
    rng, name = np.random.default_rng(0), _LAYERS + ".{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (_RANK, _WIDTH), "B": (_WIDTH, _RANK)}
    return {name.format(i, m): rng.normal(size=shapes[m]).astype(np.float32) for i in range(2) for m in "AB"}


def _adapter(place: Place, config, tensors) -> list[str]:
    folder = place / "adapter"
    folder.mkdir()
    if isinstance(config, dict):
        config = {"base_model_name_or_path": str(place.model()), **config}
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if tensors is not None:
        write_tensors(folder / "adapter_model.safetensors", tensors)
    return ["export", "--model", str(folder), "--out", place.out]


def _configured(changes, place: Place, rng: Random) -> list[str]:
    return _adapter(place, {**_CONFIG, **changes}, _tensors())


def _without(key: str, place: Place, rng: Random) -> list[str]:
    return _adapter(place, {name: value for name, value in _CONFIG.items() if name != key}, _tensors())


def _written(text: str, place: Place, rng: Random) -> list[str]:
    return _adapter(place, text, _tensors())


def _spoiled(change, place: Place, rng: Random) -> list[str]:
    tensors = _tensors()
    return _adapter(place, _CONFIG, change(tensors, rng.choice(sorted(tensors))))


def _header(header: bytes, place: Place, rng: Random) -> list[str]:
    words = _adapter(place, _CONFIG, None)
    write_safetensors(place / "adapter" / "adapter_model.safetensors", header)
    return words


def _retyped(kind: str, tensors, name):
    return {**tensors, name: np.ones(tensors[name].shape, kind)}


def _with(key: str, tensors, name):
    return {**tensors, key: np.ones((_RANK, _WIDTH), np.float32)}


def _cases() -> list[Case]:
    cases = []
    for key, values in {
        "r": (0, -3, 2.5, "8", None, [8], True, 10**30),
        "lora_alpha": ("16", None, [1], True, float("inf"), float("nan")),
        "target_modules": (None, 17, {"a": 1}, [1], [], "(", ["nothing"], "nothing"),
        "rank_pattern": ([1], {"q_proj": 0}, {"q_proj": "8"}, {"(": 2}),
        "alpha_pattern": (3, {"q_proj": None}),
        "use_rslora": ("yes", 3),
        "use_dora": ("yes",),
        "modules_to_save": (3, [3], ["nothing"]),
        "layers_to_transform": ("all", [-1], [0.5], [99], {"a": 1}),
        "layers_pattern": (5,),
        "trainable_token_indices": ("all", [-1], [10**9], {"nothing": [1]}),
        "base_model_name_or_path": ("", None, 5, [1], "/nothing/there", "\x1b[31mred"),
        "revision": (5, ["main"]),
        "bias": ("some", 5, ["none"]),
        "peft_type": ("IA3", None, 5, "PREFIX_TUNING", ["LORA"]),
        "task_type": ("SEQ_CLS", 5, ["CAUSAL_LM"]),
        "init_lora_weights": ("pissa", "loftq", 5, "nothing"),
        "use_qalora": (True,),
        "lora_bias": (True,),
        "megatron": ({"a": 1},),
        "exclude_modules": (5, ["q_proj"]),
    }.items():
        for value in values:
            says = r"adapter|nothing|LORA|base|hub|red"
            shown = repr(value)[:30]
            cases.append(Case(f"adapter: {key} is {shown}", partial(_configured, {key: value}), says))
    for key in ("r", "lora_alpha", "target_modules"):
        cases.append(Case(f"adapter: without {key}", partial(_without, key), f"no key '{key}'"))
    for name, text, says in (
        ("an array", "[]", "JSON object"),
        ("no JSON", "{", "not valid JSON"),
        ("nested deeply", '{"r": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested"),
        ("with a key twice", '{"r": 1, "r": 2}', "twice"),
    ):
        cases.append(Case(f"adapter: its configuration is {name}", partial(_written, text), says))
    for name, change, says in (
        ("a tensor is missing", lambda t, n: {k: v for k, v in t.items() if k != n}, "tensor"),
        ("all are missing", lambda t, n: {}, "tensor"),
        (
            "another rank",
            lambda t, n: {k: np.concatenate([v, v], axis=int("lora_B" in k)) for k, v in t.items()},
            "shape",
        ),
        ("a matrix is transposed", lambda t, n: {**t, n: np.ascontiguousarray(t[n].T)}, "shape"),
        ("a scalar", lambda t, n: {**t, n: np.float32(1).reshape(())}, "shape"),
        ("an empty one", lambda t, n: {**t, n: t[n][:0]}, "shape"),
        ("NaN", lambda t, n: {**t, n: t[n] * np.nan}, "finite"),
        ("infinity", lambda t, n: {**t, n: t[n] * np.inf}, "finite"),
        ("integers", partial(_retyped, "i4"), "type I32"),
        ("booleans", partial(_retyped, "b1"), "type BOOL"),
        ("complex numbers", partial(_retyped, "c8"), "C64|safetensors"),
        (
            "a layer too many",
            partial(_with, "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"),
            "layers.2",
        ),
        ("another module", partial(_with, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"), "up_proj"),
        ("an unknown name", partial(_with, "score\x1b[2J\u202e.weight"), "score"),
    ):
        cases.append(Case(f"adapter: {name}", partial(_spoiled, change), says))
    cases += [
        Case("adapter: its tensors are no safetensors", partial(_header, b"hello"), "not a readable safetensors"),
        Case("adapter: its tensors are missing", lambda place, rng: _adapter(place, _CONFIG, None), "adapter_model"),
    ]
    return cases


CASES = _cases()
