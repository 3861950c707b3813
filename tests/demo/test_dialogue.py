"""The insight `dialogue`: a run that is as short as possible, and what `qstar demo --insight dialogue` left."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qstar_jax.cli.main import main
from qstar_jax.config import ComputeOptions, DemoConfig, MeshOptions
from qstar_jax.demo import dialogue
from qstar_jax.evaluation.insights.dialogue import ALL, NOISY, PLAYER, SAMPLED, TURNS, Dialogue
from qstar_jax.store.open import load_model

FOLDER = os.environ.get("QSTAR_DEMO_DIALOGUE")
needs_run = pytest.mark.skipif(FOLDER is None, reason="QSTAR_DEMO_DIALOGUE does not name a run of that insight")


@pytest.fixture(scope="module")
def short(tmp_path_factory, on_devices, one_device):
    """(folder, what was printed) of a run of a few steps."""
    out, printed = tmp_path_factory.mktemp("dialogue"), io.StringIO()
    size = dialogue.Size(lists=2, dialogues=2, steps=2, held_out=20, games=1)
    with on_devices(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dialogue, "make_mesh", lambda: one_device)
        dialogue.run(DemoConfig(out=str(out), insight="dialogue", seed=3), Console(file=printed, width=120), size)
    return out, printed.getvalue()


@pytest.mark.slow
def test_everything_is_measured_and_shown(short):
    out, printed = short
    record, summary = Dialogue.read(out / "dialogue"), json.loads((out / "summary.json").read_text())
    assert {games.policy for games in record.games} == {PLAYER, TURNS, ALL, NOISY}
    assert record.pairs == 128 and record.seed == summary["seed"] == 3 and record.of(TURNS).games == 16
    assert summary["size"]["steps"] == 2 and summary["verdicts"][0]["insight"] == "dialogue"
    page = (out / "report.html").read_text()
    assert "Asking questions" in page and (out / "dialogue.png").exists() and "Asking questions" in printed
    assert "tokens of users, tools and templates, which are not learned" in " ".join(printed.split())


@pytest.mark.slow
def test_the_record_can_be_shown_again(short, tmp_path):
    out, _ = short
    assert main(["report", "--dialogue", str(out / "dialogue"), "--out", str(tmp_path), "--title", "Once more"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Once more" in page and "Asking questions" in page and (tmp_path / "dialogue.png").exists()


@pytest.mark.slow
def test_runs_differ_in_what_is_an_action(short, one_device):
    out, _ = short
    lines = {name: (out / folder / "metrics.jsonl").read_text() for name, (folder, *_) in dialogue._RUNS.items()}
    lengths = {name: json.loads(text.splitlines()[0])["lengths/chosen"] for name, text in lines.items()}
    assert lengths[ALL] > 1.5 * lengths[TURNS]
    trained = [
        load_model(out / folder, ComputeOptions(), one_device, MeshOptions()) for folder, *_ in dialogue._RUNS.values()
    ]
    embeddings = [np.asarray(loaded.params["embed"]["embedding"]) for loaded in trained]
    assert all((one != other).any() for n, one in enumerate(embeddings) for other in embeddings[:n])


@pytest.mark.slow
def test_the_first_model_is_drawn_by_the_seed(short):
    weights = [(short[0] / "random" / "model.safetensors").read_bytes()]
    dialogue._write_random(short[0] / "again", 3)
    dialogue._write_random(short[0] / "other", 4)
    weights += [(short[0] / name / "model.safetensors").read_bytes() for name in ("again", "other")]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.slow
def test_options_without_effect_and_folders_in_use_are_refused(short, capsys):
    assert main(["demo", "--insight", "dialogue", "--from_scratch"]) == 2
    assert "--from_scratch has no effect with --insight dialogue" in capsys.readouterr().err
    assert main(["demo", "--insight", "dialogue", "--out", str(short[0])]) == 2
    assert "is there already" in capsys.readouterr().err


@needs_run
def test_what_held_for_every_seed_that_was_tried():
    record = Dialogue.read(Path(FOLDER) / "dialogue")
    assert record.of(TURNS, SAMPLED).returns.low > record.of(PLAYER, SAMPLED).returns.high
