"""The insight `diffusion`: a run that is as short as possible."""

import io
import json

import pytest
from rich.console import Console

from qstar_jax.cli.main import main
from qstar_jax.config import DemoConfig
from qstar_jax.demo import diffusion
from qstar_jax.evaluation.insights.diffusion import Diffusion


@pytest.mark.slow
def test_everything_is_measured_and_shown(tmp_path, capsys):
    pytest.importorskip("sklearn")
    out, printed = tmp_path / "diffusion", io.StringIO()
    size = diffusion.Size(base=40, stops=(2, 4), pairs=50, samples=20)
    diffusion.run(DemoConfig(out=str(out), insight="diffusion", seed=3), Console(file=printed, width=120), size)
    record, summary = Diffusion.read(out / "diffusion"), json.loads((out / "summary.json").read_text())
    assert [one.beta_dpo for one in record.strengths] == list(diffusion.STRENGTHS)
    assert record.reference.kl.mean == 0 and all(one.points[-1].kl.mean > 0 for one in record.strengths)
    # Eq. 16: log-ratios of the reference's own images are -KL on average.
    for one in record.strengths:
        assert (one.chosen.mean + one.rejected.mean) / 2 == pytest.approx(one.expected.mean, rel=0.2)
    assert summary["seed"] == 3 and summary["verdicts"][0]["insight"] == "diffusion"
    assert "Rewards of denoising steps" in (out / "report.html").read_text() and "beta_dpo 20" in printed.getvalue()
    assert main(["report", "--diffusion", str(out / "diffusion"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "diffusion.png").exists()
    assert main(["demo", "--insight", "diffusion", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["demo", "--insight", "diffusion", "--from_scratch"]) == 2
    assert "always begins from scratch" in capsys.readouterr().err
