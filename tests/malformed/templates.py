"""Malformed chat templates, of a model's folder or of a file."""

import json
import os
from functools import partial
from pathlib import Path
from random import Random

from case import Case, Place

_CHAT = {
    "prompt": [{"role": "user", "content": "w1 w2"}],
    "chosen": [{"role": "assistant", "content": "w3"}],
    "rejected": [{"role": "assistant", "content": "w4"}],
}
_PLAIN = "{% for m in messages %}{{ m.role }} {{ m.content }} [EOS]{% endfor %}"


def _words(place: Place, *more: str) -> list[str]:
    rows = place.rows(_CHAT, _CHAT)
    return ["data", str(rows), "--model", str(place.model()), *more]


def _of_model(text: str, place: Place, rng: Random) -> list[str]:
    words = _words(place)
    (place / "model" / "chat_template.jinja").write_text(text)
    return words


def _of_config(value, place: Place, rng: Random) -> list[str]:
    words, path = _words(place), place / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": value}))
    return words


def _of_file(content: bytes, place: Place, rng: Random) -> list[str]:
    (place / "t.jinja").write_bytes(content)
    return _words(place, "--data.chat_template", str(place / "t.jinja"))


def _special(make, place: Place, rng: Random) -> list[str]:
    make(place / "t.jinja")
    return _words(place, "--data.chat_template", str(place / "t.jinja"))


def _endless(path: Path):
    path.symlink_to("/dev/zero")


def _huge(place: Place, rng: Random) -> list[str]:
    return _of_file(b"{{ messages }}" + b"a" * 10**8, place, rng)


def _huge_of_model(place: Place, rng: Random) -> list[str]:
    return _of_model("{{ messages }}" + "a" * 10**8, place, rng)


def _cases() -> list[Case]:
    endless = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    doubled = "{% set n = namespace(s='a' * 1000) %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    both = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    heavy = (
        ("loops for ever", endless, "10 s"),
        ("calls itself twice", both, "10 s"),
        ("computes an immense power", "{{ 10 ** (10 ** 10) }}", "10 s|GiB"),
        ("computes an immense power of what it is given", "{{ (messages | length * 9) ** (10 ** 10) }}", "10 s|GiB"),
        ("doubles a text", doubled, "GiB|characters|refuses"),
        ("multiplies a text", "{{ 'a' * 10 ** 10 }}", "GiB"),
        ("pads a text", "{{ 'a' | center(10 ** 10) }}", "GiB"),
        ("formats immensely", "{{ '%99999999999d' % 1 }}", "GiB|refuses|cannot"),
        ("makes 100 MB", "{{ 'a' * 10 ** 8 }}", "characters"),
        ("makes a list of all", "{{ (messages * 10 ** 10) | length }}", "GiB|10 s"),
    )
    cases = [
        Case(f"template: it {name}", partial(_of_model, text + _PLAIN), f"template.*({says})", heavy=True)
        for name, text, says in heavy
    ]
    for name, text, says in (
        ("makes range(10**12)", "{% for a in range(10 ** 12) %}a{% endfor %}", "refuses.*[Rr]ange"),
        ("calls itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("reaches for a class", "{{ ''.__class__.__mro__ }}", "reaches for .__(class|mro)__"),
        ("reaches for globals", "{{ raise_exception.__globals__ }}", "reaches for .__globals__"),
        ("reaches by a filter", "{{ ''|attr('__class__')|string }}", "reaches for .__(class|mro)__"),
        ("reaches by a format", "{{ '{0.__class__.__mro__}'.format('') }}", "refuses.*unsafe"),
        ("changes the messages", "{{ messages.append(1) }}", "refuses.*(unsafe|safe|append)"),
        ("reads a file", "{% include '/etc/passwd' %}", "template.*loader"),
        ("imports a file", "{% import '/etc/passwd' as p %}", "template.*loader"),
        ("extends a file", "{% extends '/etc/passwd' %}", "template.*loader"),
        ("fails", "{{ 1 / 0 }}", "template.*zero"),
        ("refuses", "{{ raise_exception('\x1b[31mno\u202e') }}", "refuses.*no"),
        ("is half", "{% for m in messages %", "not valid Jinja"),
        ("lacks an end", "{% for m in messages %}", "not valid Jinja"),
        ("has an unknown filter", "{{ messages | pickle }}", "not valid Jinja.*pickle"),
        ("has an unknown tag", "{% python import os %}", "not valid Jinja.*python"),
        ("is nested deeply", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested"),
        ("has many blocks", "{% if messages %}" * 3000 + "{% endif %}" * 3000, "template.*(nested|compiled|Jinja)"),
    ):
        cases.append(Case(f"template: it {name}", partial(_of_model, text + _PLAIN), says))
    for name, text in (("reads no messages", "hello"), ("is blank", " ")):
        cases.append(Case(f"template: it {name}", partial(_of_model, text), "never reads|no chat template|equal"))
    for name, value in (
        ("a number", 17),
        ("a list of numbers", [1, 2]),
        ("an object", {"default": 5}),
        ("true", True),
        ("a list without names", [{"template": _PLAIN}]),
        ("a number of a name", [{"name": "default", "template": 3}]),
    ):
        cases.append(Case(f"template: it is {name}", partial(_of_config, value), "template|tokenizer"))
    cases += [
        Case("template: a file is not UTF-8", partial(_of_file, b"{{ messages }}\xff"), "UTF-8"),
        Case("template: a file is empty", partial(_of_file, b""), "never reads"),
        Case("template: a file of 100 MB", _huge, "MiB", heavy=True),
        Case("template: a model's file of 100 MB", _huge_of_model, "characters|MiB", heavy=True),
        Case("template: a file is a folder", partial(_special, Path.mkdir), "neither"),
        Case("template: a file is a named pipe", partial(_special, os.mkfifo), "neither", heavy=True),
        Case(
            "template: a file is a device",
            partial(_special, lambda p: p.symlink_to("/dev/zero")),
            "neither",
            heavy=True,
        ),
    ]
    return cases


CASES = _cases()
