"""Records of insights in files."""

import json
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.record import Record
from qstar_jax.evaluation.intervals import Interval


@dataclass(frozen=True)
class Lengths(Record):
    NAME: ClassVar[str] = "lengths"
    COMMAND: ClassVar[str] = "qstar measure"

    model: str
    means: dict[str, Interval | None]
    runs: tuple[Interval, ...] = ()
    notes: list[str] = field(default_factory=list)


LENGTHS = Lengths("m", {"greedy": Interval(2.0, 1.0, 3.0), "beams": None}, (Interval(0.5, 0.0, 1.0),), ["long"])


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    LENGTHS.write(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "lengths.json").read_text()) == {
        "model": "m",
        "means": {"greedy": {"mean": 2.0, "low": 1.0, "high": 3.0}, "beams": None},
        "runs": [{"mean": 0.5, "low": 0.0, "high": 1.0}],
        "notes": ["long"],
    }
    assert Lengths.read(tmp_path / "new") == LENGTHS


def test_keys_that_are_no_field_are_skipped_and_defaults_filled_in():
    assert Lengths.from_json({"model": "m", "means": {}, "extra": 1}, "f") == Lengths("m", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"lengths\.json: no such file; --lengths expects a folder that `qstar measure` wrote"),
        ("{", r"lengths\.json: not valid JSON .*; run `qstar measure` again"),
        ("[]", r"lengths\.json: expected an object with model, means, found \[\]; run `qstar measure` again"),
        ('{"model": "m"}', r"expected an object with means, found one with model; run `qstar measure` again"),
        ('{"model": "m", "means": {"greedy": 1}}', r"expected an object with mean, low, high, found 1; run"),
        ("[" * 100_000, r"not valid JSON \(nested more than 100 deep\); run `qstar measure` again"),
        ('{"model": 5, "means": {}}', r"lengths\.json: model is 5; expected a text; run `qstar measure` again"),
        ('{"model": "m", "means": [1]}', r"means is \[1\]; expected an object; run"),
        ('{"model": "m", "means": {"a": {"mean": "2", "low": 1, "high": 3}}}', "mean is '2'; expected a number; run"),
        ('{"model": "m", "means": {"a": {"mean": true, "low": 1, "high": 3}}}', "mean is True; expected a number; run"),
        ('{"model": "m", "means": {}, "runs": 5}', "runs is 5; expected a list; run"),
        ('{"model": "m", "means": {}, "notes": [5]}', "an entry of notes is 5; expected a text; run"),
    ],
)
def test_what_is_no_such_file_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "lengths.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Lengths.read(tmp_path)
