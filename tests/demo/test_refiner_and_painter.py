"""Arms of the refiner and the painter on small references: resumed from the folder, and measured as the table says."""

import json
import sys

import jax
import numpy as np
import pytest

from qstar_jax.demo import refiner_and_painter as demo
from qstar_jax.demo.arms_table import summarize
from qstar_jax.tasks import digits, drawing


@pytest.fixture(scope="module")
def setting():
    pytest.importorskip("sklearn")
    refiner, painter = drawing.Refiner(drawing.make_model(width=32)), drawing.Painter(drawing.make_schedule(4))
    references = {
        "refiner": drawing.fit_refiner(refiner.model, jax.random.key(0), steps=20, learning_rate=1e-2)[0],
        "painter": digits.init_denoiser(jax.random.key(1), (16,), conditions=12),
    }
    judges = drawing.Judges.fit(digits.load_images())
    pairs = drawing.draw_pairs(refiner, painter, tuple(references.values()), judges, jax.random.key(2), count=64)
    return demo.Setting(refiner, painter, references, judges, pairs, seed=0)


def test_batches_are_functions_of_the_step(setting):
    source = demo.PairSource(setting.pairs, seed=3)
    first, again, second = source.at_step(0), source.at_step(0), source.at_step(1)
    np.testing.assert_array_equal(first.chosen[1], again.chosen[1])
    assert (first.chosen[1] != second.chosen[1]).any()


@pytest.mark.slow
def test_arms_are_run_once_and_summarized(setting, tmp_path, monkeypatch, capsys):
    size, run_arm = demo.Size(steps=4, measure_every=2, measured=40), demo.run_arm
    monkeypatch.setattr(demo, "BATCH", 8)
    monkeypatch.setattr(demo, "run_arm", lambda setting, name: run_arm(setting, name, size))
    prepared = []
    monkeypatch.setattr(demo, "prepare", lambda seed: prepared.append(seed) or setting)
    monkeypatch.setattr(demo, "keep_programs", lambda: None)
    arms = ["only refiner", "separate"]
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path), "--seeds", "0", "--arms", *arms])
    demo.main()
    demo.main()  # nothing is left to do
    assert prepared == [0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["only-refiner-0.json", "separate-0.json"]
    assert "only refiner" in capsys.readouterr().out
    table = summarize(tmp_path, demo.NAMES, [0, 1], [*arms, "joint"], demo.KLS, demo.SCORE)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["painter's faults"][0] == "0.50"  # a painter that is not trained is never blamed
    assert cells["before"][0] == cells["before"][1] and cells["seeds"] == ["1", "1"]  # what is missing is left out
    ends = [json.loads((tmp_path / f"{arm}-0.json").read_text())["curve"][-1] for arm in ("only-refiner", "separate")]
    assert [end["step"] for end in ends] == [4, 4]
    assert ends[0]["kl"][1] == 0 and 0 not in ends[1]["kl"]  # the painter moves where it is trained
