"""generations.jsonl, as other verbs read it."""

import json

import pytest

from qstar_jax.decoding.generations_file import read_generations
from qstar_jax.errors import InputError

WHOLE = {"row": 0, "answers": 1, "prompt": "p", "finish": "eos", "text": "a\u2028b", "reward": 0.5}


def write(folder, *lines):
    (folder / "generations.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def test_generations_are_read_as_written(tmp_path):
    write(tmp_path, json.dumps(WHOLE, ensure_ascii=False))
    assert read_generations(tmp_path) == [WHOLE]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"row": 0}', "no answers, prompt, finish"),
        ('{"row": 0', "Expecting ',' delimiter"),
        ('{"row": 0, "row": 1}', "the key 'row' occurs twice"),
        (json.dumps(WHOLE | {"reward": float("inf")}), "found the number Infinity"),
        (json.dumps(WHOLE).replace("0.5", "1e999"), "found the number 1e999"),
        ("[" * 100_000, "nested more than 100 deep"),
    ],
)
def test_damaged_lines_are_refused_by_number(line, problem, tmp_path):
    write(tmp_path, json.dumps(WHOLE), line)
    with pytest.raises(InputError, match=rf"generations\.jsonl line 2: not a generation \({problem}"):
        read_generations(tmp_path)
