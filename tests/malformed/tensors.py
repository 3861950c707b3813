"""Malformed weights and indices."""

import json
import os
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from case import Case, Place, weights, write_safetensors, write_tensors

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def _retyped(kind: str, place: Place, rng: Random) -> list[str]:
    tensors = weights()
    name = rng.choice(sorted(tensors))
    tensors[name] = np.ones(tensors[name].shape, kind)
    return place.export(place.model(tensors=tensors))


def _spoiled(change, place: Place, rng: Random) -> list[str]:
    tensors = weights()
    change(tensors, rng.choice(sorted(tensors)))
    return place.export(place.model(tensors=tensors))


def _missing(tensors, name):
    del tensors[name]


def _wider(tensors, name):
    tensors[name] = np.concatenate([tensors[name], tensors[name]])


def _transposed(tensors, name):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def _scalar(tensors, name):
    tensors[name] = np.float32(1).reshape(())


def _empty(tensors, name):
    tensors[name] = tensors[name][:0]


def _renamed(tensors, name):
    tensors[name.replace("model", "net").replace("lm", "net")] = tensors.pop(name)


def _extra(tensors, name):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)


def _extra_layer(tensors, name):
    tensors |= {key.replace("layers.1.", "layers.2."): value for key, value in tensors.items() if "layers.1." in key}


def _extra_unknown(tensors, name):
    tensors["score.weight"] = np.zeros((1, 16), np.float32)


def _extra_acting(tensors, name):
    tensors["\x1b[2J\u202escore"] = np.zeros((1, 16), np.float32)


def _not_finite(number, tensors, name):
    tensors[name].flat[-1] = number


def _header(header: bytes | dict, data: bytes, place: Place, rng: Random) -> list[str]:
    folder = place.model()
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_safetensors(folder / _FILE, header, data)
    return place.export(folder)


def _bytes(content, place: Place, rng: Random) -> list[str]:
    folder = place.model()
    (folder / _FILE).write_bytes(content((folder / _FILE).read_bytes(), rng))
    return place.export(folder)


def _replaced(make, place: Place, rng: Random) -> list[str]:
    folder = place.model()
    (folder / _FILE).unlink()
    make(folder / _FILE)
    return place.export(folder)


def _pickle(path: Path):
    path.with_name("pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")


def _index(make, place: Place, rng: Random) -> list[str]:
    """Splits the weights in two files; `make` writes the text of the index for their names."""
    folder, tensors = place.model(), weights()
    (folder / _FILE).unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        write_tensors(folder / file, {name: tensors[name] for name in names if files[name] == file})
    text = make(files, rng, folder)
    (folder / _INDEX).write_text(text if isinstance(text, str) else json.dumps(text))
    return place.export(folder)


def _elsewhere(files, rng, folder):
    first = sorted(files.values())[0]
    target = folder.parent / first
    (folder / first).rename(target)
    path = rng.choice([f"../{first}", str(target)])
    return {"weight_map": {name: path if file == first else file for name, file in files.items()}}


def _swapped(files, rng, folder):
    first, second = sorted(set(files.values()))
    return {"weight_map": {name: second if file == first else first for name, file in files.items()}}


def _listed_but_absent(files, rng, folder):
    return {"weight_map": files | {"model.layers.2.input_layernorm.weight": next(iter(files.values()))}}


def _cases() -> list[Case]:
    cases = [
        Case(f"weights: a tensor of type {kind}", partial(_retyped, kind), rf"numbers of type {name}; expected")
        for kind, name in (
            *(("int8", "I8"), ("uint8", "U8"), ("int16", "I16"), ("int32", "I32"), ("int64", "I64"), ("bool", "BOOL")),
            *(("complex64", "C64|not a readable"), ("float64", "F64")),
        )
    ]
    for name, change, says in (
        ("a tensor is missing", _missing, "no tensor"),
        ("a tensor is twice as long", _wider, "has shape .* expected"),
        ("a matrix is transposed", _transposed, "has shape .* expected"),
        ("a tensor is a scalar", _scalar, "has shape .* expected"),
        ("a tensor is empty", _empty, "has shape .* expected"),
        ("a tensor has another name", _renamed, "its files hold|no tensor"),
        ("a bias is left over", _extra, "does not use"),
        ("a layer is left over", _extra_layer, "does not use"),
        ("a head is left over", _extra_unknown, "does not use"),
        ("a name acts in terminals", _extra_acting, "does not use"),
        ("NaN", partial(_not_finite, np.nan), "not finite"),
        ("infinity", partial(_not_finite, np.inf), "not finite"),
    ):
        cases.append(Case(f"weights: {name}", partial(_spoiled, change), says))
    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    for name, header, data in (
        ("is empty", b"", b""),
        ("is no JSON", b"not json", b""),
        ("is an array", b"[]", b""),
        ("holds no tensors", {}, b""),
        ("is nested deeply", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
        ("has an unknown type", {"a": {**good, "dtype": "F99"}}, b"\0" * 16),
        ("has a negative shape", {"a": {**good, "shape": [-2, -2]}}, b"\0" * 16),
        ("has an immense shape", {"a": {**good, "shape": [2**40, 2**40]}}, b"\0" * 16),
        ("points behind the end", {"a": good}, b"\0" * 8),
        ("points backwards", {"a": {**good, "data_offsets": [16, 0]}}, b"\0" * 16),
        ("has tensors that overlap", {"a": good, "b": good}, b"\0" * 16),
        ("has a hole", {"a": {**good, "data_offsets": [16, 32]}}, b"\0" * 32),
        ("has bytes left over", {"a": good}, b"\0" * 64),
        ("has a tensor twice", b'{"a": %b, "a": %b}' % ((json.dumps(good).encode(),) * 2), b"\0" * 16),
    ):
        cases.append(
            Case(
                f"weights: the header {name}",
                partial(_header, header, data),
                "not a readable safetensors|no tensor|does not use",
            )
        )
    for name, content in (
        ("is empty", lambda old, rng: b""),
        ("has three bytes", lambda old, rng: b"abc"),
        ("is half", lambda old, rng: old[: len(old) // 2]),
        ("lacks a byte", lambda old, rng: old[:-1]),
        ("ends in its header", lambda old, rng: old[: rng.randint(9, 200)]),
        (
            "says that its header is immense",
            lambda old, rng: (2 ** rng.randint(40, 63)).to_bytes(8, "little") + old[8:],
        ),
        ("is text", lambda old, rng: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        ("is random", lambda old, rng: rng.randbytes(5000)),
        ("is zeros", lambda old, rng: b"\0" * 5000),
    ):
        cases.append(
            Case(f"weights: the file {name}", partial(_bytes, content), "not a readable safetensors|no tensor")
        )
    for name, make, says in (
        ("are missing", lambda path: None, "no model.safetensors"),
        ("are a folder", Path.mkdir, "model.safetensors"),
        ("are a named pipe", os.mkfifo, "model.safetensors"),
        ("are an endless device", lambda path: path.symlink_to("/dev/zero"), "model.safetensors"),
        ("are a dangling link", lambda path: path.symlink_to("nothing"), "model.safetensors"),
        ("are a pickle", _pickle, "pickle"),
    ):
        cases.append(
            Case(f"weights: {name}", partial(_replaced, make), says, heavy="named" in name or "device" in name)
        )
    for name, make, says in (
        ("is an array", lambda files, rng, folder: [], "expected a JSON object"),
        ("is no JSON", lambda files, rng, folder: "{", "not valid JSON"),
        ("has no map", lambda files, rng, folder: {}, "weight_map"),
        ("has a list as map", lambda files, rng, folder: {"weight_map": list(files)}, "weight_map"),
        ("maps to a number", lambda files, rng, folder: {"weight_map": files | {"lm_head.weight": 3}}, "weight_map"),
        ("maps to a list", lambda files, rng, folder: {"weight_map": files | {"lm_head.weight": ["a"]}}, "weight_map"),
        ("is an empty map", lambda files, rng, folder: {"weight_map": {}}, "weight_map|no tensor"),
        (
            "names a missing file",
            lambda files, rng, folder: {"weight_map": files | {"lm_head.weight": "x.safetensors"}},
            "missing",
        ),
        ("names a file outside", _elsewhere, "weight_map|outside"),
        ("swaps the files", _swapped, "another file"),
        ("lists an absent tensor", _listed_but_absent, r"layers\.2"),
        (
            "names a file with escape codes",
            lambda files, rng, folder: {"weight_map": files | {"lm_head.weight": "\x1b[31m.safetensors"}},
            "missing",
        ),
        (
            "names another kind of file",
            lambda files, rng, folder: {"weight_map": files | {"lm_head.weight": "config.json"}},
            "config.json: not a readable",
        ),
        (
            "is nested deeply",
            lambda files, rng, folder: '{"weight_map": ' + '{"a":' * 50_000 + "1" + "}" * 50_001,
            "nested",
        ),
    ):
        cases.append(Case(f"index: it {name}", partial(_index, make), says))
    return cases


CASES = _cases()
