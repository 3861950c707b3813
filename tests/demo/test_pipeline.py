"""The insight `pipeline`: a run that is as short as possible."""

import io
import json

import pytest
from rich.console import Console

from qstar_jax.cli.main import main
from qstar_jax.config import DemoConfig
from qstar_jax.demo import pipeline, refiner_and_painter
from qstar_jax.evaluation.insights.pipeline import Pipeline


@pytest.mark.slow
def test_everything_is_measured_and_shown(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(pipeline, "make_arms", lambda names: ["joint", "only refiner"])
    for name in ("fit_refiner", "fit_painter"):
        monkeypatch.setattr(refiner_and_painter.drawing, name, _briefly(getattr(refiner_and_painter.drawing, name)))
    out, printed = tmp_path / "drawing", io.StringIO()
    size = refiner_and_painter.Size(pairs=64, steps=2, measured=40, measure_every=1)
    pipeline.run(DemoConfig(out=str(out), insight="pipeline", seed=3), Console(file=printed, width=120), size)
    record, summary = Pipeline.read(out / "pipeline"), json.loads((out / "summary.json").read_text())
    assert [arm.name for arm in record.arms] == ["joint", "only refiner"] and record.stages == ("refiner", "painter")
    assert [point.steps for point in record.arms[0].curve] == [0, 1, 2] and record.seed == 3
    assert record.arms[1].curve[-1].kl[1] == 0  # the painter is not trained there
    assert summary["verdicts"][0]["insight"] == "pipeline" and "What each way to train earns" in printed.getvalue()
    assert "Several models, one preference" in (out / "report.html").read_text()
    assert main(["report", "--pipeline", str(out / "pipeline"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "pipeline.png").exists()
    assert main(["demo", "--insight", "pipeline", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def _briefly(fit):
    return lambda *args, **options: fit(*args, **options | {"steps": 10})
