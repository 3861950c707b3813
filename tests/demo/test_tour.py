"""What `qstar demo` left: run it, and name its folder in QSTAR_DEMO."""

import json
import os
from pathlib import Path

import pytest

from qstar_jax.demo import tour
from qstar_jax.tiny_tldr import BASE

FOLDER = os.environ.get("QSTAR_DEMO")
needs_demo = pytest.mark.skipif(FOLDER is None, reason="QSTAR_DEMO does not name the folder of a run of `qstar demo`")


@pytest.fixture(scope="module")
def summary():
    return json.loads((Path(FOLDER) / "summary.json").read_text())


@needs_demo
def test_the_papers_directions_are_reproduced(summary):
    assert {verdict["insight"]: verdict["reproduced"] for verdict in summary["verdicts"]} == {
        "credit": True, "search": True, "decline": True,
    }  # fmt: skip


@needs_demo
def test_numbers_are_those_that_the_readme_promises(summary):
    credit = summary["credit"]
    assert credit["detectors"]["implicit reward"]["mean"] >= 0.9
    assert all(difference["low"] > 0 for difference in credit["differences"].values())
    assert credit["detectors"]["true advantage"]["mean"] > credit["detectors"]["implicit reward"]["mean"]
    assert [run["beta"] for run in summary["sweep"]["runs"]] == list(tour.BETAS)


@needs_demo
def test_everything_is_there():
    folder = Path(FOLDER)
    names = {"report.html", "summary.json", "metrics.jsonl", "credit.png", "sweep.png", "decline.png"}
    assert names <= {path.name for path in folder.iterdir()}
    assert (folder / "report.html").stat().st_size < 3_000_000


def test_the_base_model_is_small_and_says_how_it_was_made():
    from qstar_jax.demo.pretrain import STEPS, weights_hash

    record = json.loads((BASE / "pretraining.json").read_text())
    assert record["sha256"] == weights_hash(BASE) and record["steps"] == STEPS
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 4_000_000
