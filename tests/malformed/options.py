"""Malformed files of options: `--config`, and those of `trl dpo`."""

import os
from functools import partial
from pathlib import Path
from random import Random

from case import Case, Place

_BOMB = "\n".join(["a0: &a0 [x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])


def _words(flag: str, place: Place, path: Path) -> list[str]:
    return ["dpo", flag, str(path), "--model", str(place.model()), "--train.steps", "1", "--out", place.out]


def _text(flag: str, text: str | bytes, place: Place, rng: Random) -> list[str]:
    path = place / "options.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return _words(flag, place, path)


def _special(flag: str, make, place: Place, rng: Random) -> list[str]:
    make(place / "options.yaml")
    return _words(flag, place, place / "options.yaml")


def _cases() -> list[Case]:
    cases = []
    for flag in ("--config", "--from_trl"):
        for name, text, says in (
            ("a tag that runs a command", "model: !!python/object/apply:os.system ['exit 7']", "tag|YAML"),
            ("a tag of a class", "model: !!python/name:os.system", "tag|YAML"),
            ("an unknown tag", "model: !me you", "tag|YAML"),
            ("an alias of nothing", "model: *you", "alias"),
            ("an alias of itself", "model: &me [*me]", "nest"),
            ("lists nested deeply", "model: " + "[" * 20_000 + "]" * 20_000, "nest"),
            ("objects nested deeply", "model: " + "{a: " * 3000 + "}" * 3000, "nest"),
            ("blocks nested deeply", "".join(" " * i + "a:\n" for i in range(500)), "nest"),
            ("JSON nested deeply", '{"model": ' + "[" * 50_000 + "]" * 50_000 + "}", "nest"),
            ("half a list", "model: [a, b", "YAML|expected"),
            ("a tab", "model:\n\t- a", "YAML|cannot start"),
            ("a list", "- model\n- data\n", "expected|option"),
            ("a number", "17", "expected|option"),
            ("not UTF-8", b"model: \xff\xfe\xfd", "UTF-8"),
            ("zeros", b"\0" * 5000, "YAML|not allowed|expected"),
            ("two documents", "model: a\n---\nmodel: b\n", "document"),
            ("an unknown option", "modle: a\n", "modle"),
            ("an option that acts", '"\\e[31mred\\u202e": 1\n', "red"),
        ):
            cases.append(Case(f"options: {flag}, {name}", partial(_text, flag, text), says))
        for name, make in (
            ("a folder", Path.mkdir),
            ("a named pipe", os.mkfifo),
            ("an endless device", lambda path: path.symlink_to("/dev/zero")),
            ("a dangling link", lambda path: path.symlink_to("nothing")),
        ):
            says = "not a file|No such|does not exist|cannot be read|pipe"
            cases.append(Case(f"options: {flag}, {name}", partial(_special, flag, make), says, heavy=True))
        cases += [
            Case(f"options: {flag}, a bomb of aliases", partial(_text, flag, _BOMB), "values", heavy=True),
            Case(
                f"options: {flag}, a bomb in the model",
                partial(_text, flag, f"{_BOMB}\nmodel: *a29"),
                "values",
                heavy=True,
            ),
            Case(f"options: {flag}, 100 MB", partial(_large, flag), "MiB", heavy=True),
        ]
    return cases


def _large(flag: str, place: Place, rng: Random) -> list[str]:
    return _text(flag, b"model: " + b"a" * 10**8, place, rng)


CASES = _cases()
