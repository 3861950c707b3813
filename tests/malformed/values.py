"""Malformed values of the command line, and damaged files of a run's folder."""

import json
from functools import partial
from random import Random

from case import PAIR, Case, Place

_NUMBERS = {
    "loss.beta": ("-1", "0", "nan", "inf", "1e999", "much", "[0.1]", "", "true"),
    "optimizer.lr": ("-1", "nan", "-inf", "fast", "{}", "null"),
    "train.steps": ("-1", "1.5", "1e3000", "many", "9" * 5000, "[1]", "nan"),
    "train.batch_size": ("-8", "0", "2.5", "all"),
    "train.seed": ("x", "1.5"),
    "data.max_length": ("-1", "long", "0.5"),
    "lora.rank": ("-4", "2.5", "x"),
    "mesh.data": ("0", "-2", "999", "x"),
    "loss.name": ("nothing", "\x1b[31mred\x1b[0m", "\u202edpo", "5", "[]", "__class__"),
    "optimizer.name": ("nothing", "null", "os.system"),
}


def _dpo(place: Place, *words: str) -> list[str]:
    rows, model = str(place.rows(PAIR)), str(place.model())
    return ["dpo", "--model", model, "--data.train", rows, "--train.steps", "1", "--out", place.out, *words]


def _value(option: str, value: str, place: Place, rng: Random) -> list[str]:
    return _dpo(place, f"--{option}={value}")


def _words(words, place: Place, rng: Random) -> list[str]:
    return _dpo(place, *words)


def _data(path: str, place: Place, rng: Random) -> list[str]:
    return ["dpo", "--model", str(place.model()), "--data.train", path, "--train.steps", "1", "--out", place.out]


def _run(name: str, content: bytes, resume: bool, place: Place, rng: Random) -> list[str]:
    words = _dpo(place, *(["--resume"] if resume else []))
    (place / "out" / "checkpoints" / "2" / "params").mkdir(parents=True)
    (place / "out" / "checkpoints" / "2" / "description").mkdir()
    (place / "out" / name).write_bytes(content)
    return words


def _checkpoint(files: dict[str, bytes], place: Place, rng: Random) -> list[str]:
    step = place / "run" / "checkpoints" / "2"
    for name in ("params", "description"):
        (step / name).mkdir(parents=True)
    for name, content in files.items():
        (place / "run" / name).write_bytes(content)
    return place.export(place / "run")


def _cases() -> list[Case]:
    cases = [
        Case(
            f"value: {option} {value[:20]!a}",
            partial(_value, option, value),
            option.removesuffix(".name").split(".")[-1],
        )
        for option, values in _NUMBERS.items()
        for value in values
    ]
    for name, words, says in (
        ("an unknown option", ["--loss.betta", "1"], "loss.beta"),
        ("an unknown option that acts", ["--\x1b[31mred\u202e", "1"], "red"),
        ("an option without a name", ["--", "1"], "1"),
        ("a word too many", ["more"], "more"),
        ("a value is missing", ["--loss.beta"], "beta"),
        ("a group of other names", ["--loss", '{"betta": 1}'], "bet"),
        ("a group that is a list", ["--loss", "[1]"], "loss"),
        ("a group that is nested deeply", ["--loss", "[" * 20_000 + "]" * 20_000], "nest"),
        ("a file of zeros for a group", ["--loss", "/dev/zero"], "not a file"),
        ("a class of Python", ["--loss", '{"class_path": "os.system"}'], "loss|class_path"),
    ):
        cases.append(Case(f"value: {name}", partial(_words, words), says))
    for path in (
        "/dev/zero",
        "/dev/random",
        "/nothing/there",
        "/",
        "",
        "\x1b[31mred\u202e",
        "gs://bucket/rows",
        "a" * 5000,
    ):
        cases.append(Case(f"value: data.train {path[:20]!a}", partial(_data, path), "data|dev|red|nothing|/|read"))
    for name, content in (
        ("empty", b""),
        ("an array", b"[]"),
        ("a number", b"5"),
        ("no YAML", b"a: ["),
        ("not UTF-8", b"\xff\xfe"),
        ("zeros", b"\0" * 5000),
        ("a tag", b"train: !!python/object/apply:os.system ['exit 7']"),
        ("of another verb", b"decode: {}"),
        ("of other kinds", b"train: 5"),
        ("nested deeply", b"train: " + b"[" * 20_000 + b"]" * 20_000),
    ):
        for resume in (False, True):
            flag = " with --resume" if resume else ""
            case = partial(_run, "config.yaml", content, resume)
            cases.append(Case(f"run: config.yaml is {name}{flag}", case, "config.yaml|belongs|checkpoint|--resume"))
    for name, files in (
        ("has no files", {}),
        (
            "has a description of garbage",
            {"checkpoints/2/description/data.json": b"\0\1\2", "checkpoints/2/_METADATA": b"{"},
        ),
        ("has metadata of another kind", {"checkpoints/2/_CHECKPOINT_METADATA": b"[]"}),
        ("has metadata that is nested deeply", {"checkpoints/2/_CHECKPOINT_METADATA": b"[" * 100_000}),
        ("has a best step of garbage", {"best.json": b"{"}),
        ("has a best step of another kind", {"best.json": b"[1]"}),
        ("has a best step that is text", {"best.json": json.dumps({"step": "../../x"}).encode()}),
        ("has a best step that is not UTF-8", {"best.json": b"\xff"}),
    ):
        cases.append(Case(f"run: it {name}", partial(_checkpoint, files), "checkpoint|best.json"))
    return cases


CASES = _cases()
