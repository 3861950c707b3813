"""Malformed config.json, generation_config.json and tokenizers."""

import json
import os
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from case import CONFIG, Case, Place

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
_NUMBERS = ("rms_norm_eps", "rope_theta")
_KINDS = {
    "negative": lambda rng: -rng.randint(1, 99),
    "zero": lambda rng: 0,
    "text": lambda rng: rng.choice(["16", "many", "", "1e3"]),
    "a fraction": lambda rng: rng.randint(1, 99) + 0.5,
    "a list": lambda rng: [rng.randint(1, 9)],
    "true": lambda rng: True,
    "infinite": lambda rng: float("inf"),
    "immense": lambda rng: 10 ** rng.randint(10, 30),
}
_FAMILIES = {  # configurations that are right, with keys that only their families read
    "gemma2": {"model_type": "gemma2", "head_dim": 4, "sliding_window": 8, "query_pre_attn_scalar": 4},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5, "layer_norm_eps": 1e-5, "rotary_emb_base": 10000},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 24},
    "phi3": {"model_type": "phi3", "sliding_window": 8},
}


def _export(config: Any, place: Place, rng: Random) -> list[str]:
    return place.export(place.model(config))


def _number(key: str, kind: str, place: Place, rng: Random) -> list[str]:
    return _export({**CONFIG, key: _KINDS[kind](rng)}, place, rng)


def _without(key: str, value: Any, place: Place, rng: Random) -> list[str]:
    config = {**CONFIG, key: None} if value is None else {k: v for k, v in CONFIG.items() if k != key}
    return _export(config, place, rng)


def _of_family(family: str, key: str, place: Place, rng: Random) -> list[str]:
    kind = rng.choice(["negative", "zero", "text", "a list", "infinite"])
    shared = {name: CONFIG[name] for name in (*_SIZES, "max_position_embeddings")} if family != "gpt2" else {}
    return _export({"vocab_size": 60, **shared, **_FAMILIES[family], key: _KINDS[kind](rng)}, place, rng)


def _text(name: str, text: str | bytes, place: Place, rng: Random) -> list[str]:
    folder = place.model()
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return place.export(folder)


def _special(name: str, make, place: Place, rng: Random) -> list[str]:
    folder = place.model()
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    return place.export(folder)


def _deep(depth: int) -> str:
    return '{"hidden_size": ' + "[" * depth + "]" * depth + "}"


def _endless(path: Path):
    path.symlink_to("/dev/zero")


def _longer(name: str, megabytes: int, place: Place, rng: Random) -> list[str]:
    folder = place.model()
    with (folder / name).open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content.rstrip()[:-1] + b', "_x": "' + b"a" * (megabytes * 10**6) + b'"}')
    return place.export(folder)


def _cases() -> list[Case]:
    cases = []
    for key in (*_SIZES, *_OPTIONAL):
        for kind in ("negative", "zero", "text", "a fraction", "a list", "true"):
            cases.append(
                Case(f"config: {key} is {kind}", partial(_number, key, kind), rf"config\.json: {key} is .*expected")
            )
        cases.append(Case(f"config: {key} is immense", partial(_number, key, "immense"), r"config\.json", heavy=True))
    for key in _NUMBERS:
        for kind in ("negative", "zero", "text", "a list", "true", "infinite"):
            cases.append(
                Case(f"config: {key} is {kind}", partial(_number, key, kind), rf"config\.json: .*{key} .*expected")
            )
    for key in (*_SIZES, "model_type"):
        for value, kind in ((None, "null"), (0, "missing")):
            cases.append(Case(f"config: {key} is {kind}", partial(_without, key, value), rf"config\.json: .*{key}"))
    for family, config in _FAMILIES.items():
        for key in sorted(config.keys() - {"model_type"}):
            cases.append(
                Case(
                    f"config: {key} of {family}", partial(_of_family, family, key), rf"config\.json: .*{key}.*expected"
                )
            )
    for rope, says in (
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "yarn", "factor": -1.0}, "factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "has no"),
        ({"rope_type": "magic"}, "magic"),
        ({"rope_type": ["linear"]}, "rope_type"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [0.0]}, "factor"),
        ({"rope_type": "default", "rope_theta": 0}, "rope_theta"),
        ("linear", "expected an object"),
        ([1], "expected an object"),
    ):
        for key in ("rope_scaling", "rope_parameters"):
            theta = {} if key == "rope_parameters" else {"rope_theta": 10000.0}
            config = {k: v for k, v in CONFIG.items() if k != "rope_theta"} | theta | {key: rope}
            cases.append(
                Case(f"config: {key} is {json.dumps(rope)[:40]}", partial(_export, config), rf"config\.json: .*{says}")
            )
    for key, value, says in (
        ("model_type", "mamba", "mamba"),
        ("model_type", ["llama"], "model_type"),
        ("model_type", 7, "model_type"),
        ("hidden_act", "magic", "hidden_act"),
        ("hidden_act", 3, "hidden_act"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings"),
        ("attention_bias", 1, "attention_bias"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("num_attention_heads", 3, "num_attention_heads"),
        ("head_dim", 3, "dimensions of a head"),
        ("unheard_of", 5, "unheard_of"),
        ("quantization_config", {"quant_method": "gptq"}, "quantized"),
        ("quantization_config", 4, "quantized"),
        ("auto_map", {"AutoModelForCausalLM": "evil.Model"}, "auto_map"),
        ("auto_map", 7, "auto_map"),
        ("eos_token_id", "two", "eos_token_id"),
        ("eos_token_id", -1, "eos_token_id"),
        ("eos_token_id", 60, "eos_token_id"),
        ("eos_token_id", [2, 10**12], "eos_token_id"),
        ("bos_token_id", "x", "bos_token_id|tokenizer"),
        ("hidden_size", int("9" * 4000), "4,000 digits"),
        ("\x1b[31mred\x1b[0m", 1, "red"),
        ("unheard_of", "\x1b]0;title\x07\u202e", "unheard_of"),
    ):
        found = "immense" if value == int("9" * 4000) else repr(value)
        cases.append(Case(f"config: {key!r} is {found[:30]}", partial(_export, {**CONFIG, key: value}), says))
    for name, text, says in (
        ("an array", "[]", "expected a JSON object"),
        ("a number", "3", "expected a JSON object"),
        ("empty", "", "not valid JSON"),
        ("half", '{"model_type": "lla', "not valid JSON"),
        ("nested deeply", _deep(100_000), "nested"),
        ("not UTF-8", b'{"model_type": "\xff\xfe"}', "UTF-8"),
        ("UTF-16", json.dumps(CONFIG).encode("utf-16"), "UTF-8"),
        ("a number of 5,000 digits", '{"hidden_size": ' + "9" * 5000 + "}", "digits"),
        ("a key twice", '{"hidden_size": 16, ' + json.dumps({**CONFIG, "hidden_size": 32})[1:], "hidden_size.* twice"),
        ("zeros", b"\0" * 5000, "not valid JSON"),
    ):
        cases.append(Case(f"config.json: {name}", partial(_text, "config.json", text), rf"config\.json: .*{says}"))
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        for kind, make in (("a folder", Path.mkdir), ("a named pipe", os.mkfifo), ("an endless device", _endless)):
            cases.append(Case(f"{file}: {kind}", partial(_special, file, make), rf"{file}", heavy=True))
    cases.append(Case("config.json: 100 MB", partial(_longer, "config.json", 100), r"config\.json: .*MiB", heavy=True))
    for text, says in (
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"eos_token_id": "2"}', "eos_token_id"),
        ('{"eos_token_id": [2, null]}', "eos_token_id"),
        ('{"eos_token_id": [2.5]}', "eos_token_id"),
        ('{"eos_token_id": -4}', "eos_token_id"),
        ('{"eos_token_id": 1000}', "eos_token_id"),
        (_deep(50_000), "nested"),
    ):
        cases.append(
            Case(
                f"generation_config.json: {text[:30]}",
                partial(_text, "generation_config.json", text),
                rf"generation_config\.json.*{says}|{says}.*generation_config\.json",
            )
        )
    for name, text in (
        ("empty", ""),
        ("not JSON", "{"),
        ("an empty object", "{}"),
        ("nested deeply", _deep(100_000)),
        ("zeros", b"\0" * 100),
        ("no vocabulary", '{"version": "1.0", "model": {"type": "WordLevel", "vocab": 3, "unk_token": "x"}}'),
    ):
        cases.append(Case(f"tokenizer.json: {name}", partial(_text, "tokenizer.json", text), "no usable tokenizer"))
    for text in ("[]", "{", '{"tokenizer_class": 7}', '{"model_max_length": "x", "bos_token": []}', _deep(100_000)):
        cases.append(
            Case(
                f"tokenizer_config.json: {text[:30]}",
                partial(_text, "tokenizer_config.json", text),
                "no usable tokenizer|tokenizer_config",
            )
        )
    return cases


CASES = _cases()
