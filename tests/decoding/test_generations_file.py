"""generations.jsonl, as other verbs read it."""

import json

import pytest

from qstar_jax.decoding.generations_file import read_generations
from qstar_jax.errors import InputError

WHOLE = {"row": 0, "rank": 0, "answers": 1, "prompt": "p", "finish": "eos", "text": "a\u2028b", "tokens": [5, 2]}
WHOLE |= {"length": 2, "logp": -1, "reward": 0.5, "drawn": None}
DROPPED = dict.fromkeys(WHOLE) | {"row": 1, "answers": 0, "finish": "dropped"}


def write(folder, *lines):
    (folder / "generations.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def test_generations_are_read_as_written(tmp_path):
    write(tmp_path, json.dumps(WHOLE, ensure_ascii=False), json.dumps(DROPPED))
    assert read_generations(tmp_path) == [WHOLE, DROPPED]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"row": 0}', "no answers"),
        ('{"row": 0', "Expecting ',' delimiter"),
        ('{"row": 0, "row": 1}', "the key 'row' occurs twice"),
        (json.dumps(WHOLE | {"reward": float("inf")}), "found the number Infinity"),
        (json.dumps(WHOLE).replace("0.5", "1e999"), "found the number 1e999"),
        ("[]", r"found \[\]; expected an object"),
        *(
            (json.dumps(WHOLE | {name: value}), f"{name} is .*; expected ")
            for name, values in {
                "row": ("1", -1, True, 0.5),
                "rank": ("first", None),
                "text": (5, None),
                "tokens": ("ab", ["5"], None),
                "logp": ("-1", True),
                "reward": ("high", True, [1]),
            }.items()
            for value in values
        ),
        *(
            (json.dumps({key: value for key, value in WHOLE.items() if key != name}), f"no {name}")
            for name in ("rank", "text", "tokens", "logp", "reward")
        ),
        ("[" * 100_000, "nested more than 100 deep"),
    ],
)
def test_damaged_lines_are_refused_by_number(line, problem, tmp_path):
    write(tmp_path, json.dumps(WHOLE), line)
    with pytest.raises(InputError, match=rf"generations\.jsonl line 2: not a generation \({problem}"):
        read_generations(tmp_path)


@pytest.mark.parametrize("ranks", [[0], [0, 0], [1, 2], [0, 1, 2]])
def test_responses_that_are_missing_or_occur_twice_are_refused(ranks, tmp_path):
    write(tmp_path, *(json.dumps(WHOLE | {"answers": 2, "rank": rank}) for rank in ranks))
    found = ", ".join(map(str, ranks))
    with pytest.raises(
        InputError, match=rf"row 0 has responses of rank {found}, and `answers` says 2; run the command"
    ):
        read_generations(tmp_path)
