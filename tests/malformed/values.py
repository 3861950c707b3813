"""Malformed values of the command line, and damaged files of a run's folder."""

import json
from functools import partial
from random import Random

from case import PAIR, Case, Place

_NUMBERS = {
    "loss.beta": ("-1", "0", "nan", "inf", "1e999", "much", "[0.1]", "", "true"),
    "optimizer.learning_rate": ("-1", "nan", "-inf", "fast", "{}", "null"),
    "train.steps": ("-1", "1.5", "1e3000", "many", "9" * 5000, "[1]", "nan"),
    "train.batch_size": ("-8", "0", "2.5", "all", "9" * 11),
    "train.seed": ("x", "1.5", "9" * 30),
    "train.epochs": ("nan", "inf"),
    "train.accumulate": ("0", "-1"),
    "train.eval_batch_size": ("-1",),
    "train.log_every": ("-1", "nan"),
    "train.keep_checkpoints": ("0", "-1"),
    "train.patience": ("-1",),
    "train.show_responses": ("-1",),
    "train.profile": ("5", "3:1", "x:y"),
    "optimizer.warmup_steps": ("-1", "1.5", "nan"),
    "optimizer.weight_decay": ("-1", "inf"),
    "optimizer.max_grad_norm": ("-1", "nan"),
    "data.max_length": ("-1", "0", "1", "long", "0.5"),
    "data.max_prompt_length": ("-3", "0", "5000"),
    "data.row_length": ("-1", "1.5"),
    "data.max_train_rows": ("-1", "0"),
    "data.max_eval_rows": ("-1", "0"),
    "lora.rank": ("-4", "2.5", "x"),
    "lora.alpha": ("-1", "0", "nan"),
    "mesh.data": ("0", "-2", "999", "x"),
    "mesh.min_shard_size": ("-1",),
    "mesh.join_timeout": ("-1", "0"),
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


def _data(option: str, path: str, place: Place, rng: Random) -> list[str]:
    return _dpo(place, f"--{option}={path}")


def _folder(option: str, files: dict[str, bytes], mode: int, place: Place, rng: Random) -> list[str]:
    (place / "data").mkdir()
    for name, content in files.items():
        (place / "data" / name).write_bytes(content)
    (place / "data").chmod(mode)
    return _dpo(place, f"--{option}={place / 'data'}")


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
        ("no passes over the rows", ["--train.steps", "0", "--train.epochs", "0"], "epochs.*more than 0"),
        ("passes less than none", ["--train.steps", "0", "--train.epochs", "-1"], "epochs.*more than 0"),
        ("a value is missing", ["--loss.beta"], "beta"),
        ("a group of other names", ["--loss", '{"betta": 1}'], "bet"),
        ("a group that is a list", ["--loss", "[1]"], "loss"),
        ("a group that is nested deeply", ["--loss", "[" * 20_000 + "]" * 20_000], "nest"),
        ("a file of zeros for a group", ["--loss", "/dev/zero"], "not a file"),
        ("a class of Python", ["--loss", '{"class_path": "os.system"}'], "loss|class_path"),
    ):
        cases.append(Case(f"value: {name}", partial(_words, words), says))
    for option in ("data.train", "data.eval"):
        for path, says in (
            ("/dev/zero", "not a file.*device"),
            ("/dev/random", "not a file.*device"),
            ("/nothing/there", "no such file; accepted"),
            ("/nothing/*.jsonl", "matches no file; accepted"),
            ("/", "cannot be read|more than .* files|several"),
            ("", "missing|to .jsonl"),
            ("nothing\0there", "no such file; accepted"),
            ("\x1b[31mred\u202e", "matches no file; accepted"),
            ("gs://bucket/rows", "bucket|gcsfs"),
            ("a" * 5000, "no such file; accepted"),
        ):
            cases.append(Case(f"value: {option} {path[:20]!a}", partial(_data, option, path), f"--{option}.*({says})"))
        for name, files, mode, says in (
            ("an empty folder", {}, 0o700, "holds no data; accepted"),
            ("a folder of texts", {"a.txt": b"a", "README.md": b"a"}, 0o700, "holds no data; accepted"),
            ("a folder of a pickle", {"a.pkl": b"a"}, 0o700, "pickle"),
            ("a folder of several kinds", {"a.jsonl": b"{}", "b.csv": b"a"}, 0o700, "several kinds"),
            ("a folder that must not be read", {}, 0, "cannot be read|holds no data"),  # root may read it
        ):
            case = partial(_folder, option, files, mode)
            cases.append(Case(f"value: {option} is {name}", case, f"--{option}.*({says})"))
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
