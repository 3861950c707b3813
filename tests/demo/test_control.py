"""The insight `control`: a run that is as short as possible."""

import io
import json

import pytest
from rich.console import Console

from qstar_jax.cli.main import main
from qstar_jax.config import DemoConfig
from qstar_jax.config.control import ControlTrainOptions
from qstar_jax.demo import control
from qstar_jax.evaluation.insights.control import Control


@pytest.mark.slow
def test_everything_is_measured_and_shown(tmp_path, capsys):
    out, printed = tmp_path / "control", io.StringIO()
    train = ControlTrainOptions(bc_steps=20, steps=10, eval_every=5, batch_size=8, success_every=5)
    control.run(DemoConfig(out=str(out), insight="control", seed=3), Console(file=printed, width=120), train)
    record, summary = Control.read(out / "control"), json.loads((out / "summary.json").read_text())
    assert record.task == "lqr" and record.seeds == (3,) and len(record.runs) == 4
    assert record.find("with_bc", 3).outcomes["excess cost"].steps == (0, 5, 10)
    assert summary["seed"] == 3 and summary["verdicts"][0]["insight"] == "control"
    page = (out / "report.html").read_text()
    assert "Falling rewards in control" in page and "Gain error" in page and "chosen segments" in printed.getvalue()
    assert "mathdefault" not in page  # labels are text
    # The seed is that of the episodes too.
    assert "seed: 3" in (out / "control" / "with_bc-3" / "config.yaml").read_text().partition("segments:")[2]
    assert main(["report", "--control", str(out / "control"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "control.png").exists()
    # What is there is not overwritten, and what has no effect is refused.
    assert main(["demo", "--insight", "control", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["demo", "--insight", "control", "--from_scratch"]) == 2
    assert "has no language model" in capsys.readouterr().err
