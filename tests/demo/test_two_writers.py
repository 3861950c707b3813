"""Arms of the two writers at a tiny size: resumed from the folder, and measured as the table says."""

import json
import sys
from random import Random

import jax
import pytest

from qstar_jax.demo import two_writers as demo
from qstar_jax.demo.arms_table import summarize
from qstar_jax.pipeline.sampling import TextRun
from qstar_jax.sharding import make_mesh
from qstar_jax.tasks.tiny_tldr.outlines import draw_outline, draw_text

SIZES = {"PAIRS": 16, "STEPS": 2, "BATCH": 8, "MICRO_BATCHES": 2, "MEASURED": 8, "MEASURE_EVERY": 1, "BLAMED": 16}
ARMS = ["only text", "separate"]


def runs_of_the_task(stages, params, posts, *, key, batch_size):
    """What a fine-tuned pair of writers would write; the base model, which stands for both here, does not end."""
    rng = Random(str(key))
    outlines = [draw_outline(demo.read_post(post), rng) for post in posts]
    return [TextRun({"outline": outline, "text": draw_text(outline, rng)}) for outline in outlines]


@pytest.mark.slow
def test_arms_are_run_once_and_summarized(tmp_path, monkeypatch, capsys):
    changes = SIZES | {"reference": lambda out, name, console: demo.BASE, "draw_runs": runs_of_the_task}
    for name, value in changes.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "keep_programs", lambda: None)
    monkeypatch.setattr(demo, "make_mesh", lambda options: make_mesh(options, jax.devices()[:1]))
    prepared, prepare = [], demo.prepare
    monkeypatch.setattr(demo, "prepare", lambda out, seed, *rest: prepared.append(seed) or prepare(out, seed, *rest))
    monkeypatch.setenv("COLUMNS", "200")  # of the table
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path), "--seeds", "0", "--arms", *ARMS])
    demo.main()
    demo.main()  # nothing is left to do
    assert prepared == [0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["only-text-0.json", "separate-0.json"]
    assert "only text" in capsys.readouterr().out
    records = [json.loads((tmp_path / f"{arm}-0.json").read_text()) for arm in ("only-text", "separate")]
    curves = [record["curve"] for record in records]
    assert [[point["step"] for point in curve] for curve in curves] == [[0, 1, 2]] * 2
    assert curves[0][0] == curves[1][0] and curves[0][0]["kl"] == [0, 0]  # both begin at the references
    assert curves[0][-1]["kl"][0] == 0 and 0 not in curves[1][-1]["kl"]  # a writer moves where it is trained
    for score in ("log pi_ref", "log pi_ref per token"):  # needs no training, so it is the same for both arms
        assert records[0]["blame"][score] == records[1]["blame"][score]
    assert {blame["runs"] for record in records for blame in record["blame"].values()} == {16}
    table = summarize(tmp_path, demo.NAMES, [0, 1], [*ARMS, "joint"], demo.KLS, "reward")
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["arm"] == ARMS and cells["seeds"] == ["1", "1"]  # what is missing is left out
    assert cells["before"][0] == cells["before"][1]
    assert cells["at the end"][1] == f"{curves[1][-1]['reward']:.2f}"
    assert cells["outline's faults"][0] == "0.50"  # a writer that is not trained is never blamed
    assert cells["outline's faults"][1] != "0.50"
    assert cells["text's faults"] == ["-", "-"]  # where a writer is always at fault, nothing can be told
