"""The insight `reasoning`: a run that is as short as possible."""

import io
import json

import pytest
from rich.console import Console

from qstar_jax.cli.main import main
from qstar_jax.config import DemoConfig
from qstar_jax.demo import reasoning
from qstar_jax.evaluation.insights.reasoning import DPO, PRM, Reasoning


@pytest.mark.slow
def test_everything_is_measured_and_shown(tmp_path, on_devices, one_device, monkeypatch, capsys):
    out, printed = tmp_path / "reasoning", io.StringIO()
    size = reasoning.Size(steps=2, held_out=40, sums=2)
    with on_devices(1):
        monkeypatch.setattr(reasoning, "make_mesh", lambda: one_device)
        reasoning.run(DemoConfig(out=str(out), insight="reasoning", seed=3), Console(file=printed, width=120), size)
    record, summary = Reasoning.read(out / "reasoning"), json.loads((out / "summary.json").read_text())
    assert record.trained_on == {PRM: 128, DPO: 128} and record.solutions == 20
    assert summary["seed"] == 3 and summary["verdicts"][0]["insight"] == "reasoning"
    # The base model slips as the solver does.
    assert record.selection["chance"][0].mean == pytest.approx(record.success, abs=0.3)
    assert record.selection["oracle"][-1].mean >= 0.5  # 0.998 if the base were the solver itself
    assert "False steps" in (out / "report.html").read_text() and "False steps" in printed.getvalue()
    assert main(["report", "--reasoning", str(out / "reasoning"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "reasoning.png").exists()
    # What is there is not overwritten, and what has no effect is refused.
    assert main(["demo", "--insight", "reasoning", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["demo", "--insight", "reasoning", "--from_scratch"]) == 2
    assert "begins from a model in the package" in capsys.readouterr().err
